"""``python -m green_torch.cli``: the same as the ``green-torch`` command."""

from __future__ import annotations

from green_torch.cli import main

main()
