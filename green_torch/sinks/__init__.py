"""Where records go: one destination a file, each with ``write(item)`` and ``close()`` (:class:`green_torch.protocols.Sink`)."""
