/* A simulated NVML: the symbols that nvidia-ml-py calls, served from a known power waveform.
 *
 * Everything is a pure function of time (CLOCK_MONOTONIC, or a virtual clock), so two processes that load the same
 * configuration see the same counters, and the true energy between any two instants is exact. The configuration is text
 * (see tests/simnvml/__init__.py, which writes it): given to sim_load(), or found in the file that SIMNVML_CONFIG names.
 *
 * A counter holds the energy up to its last update instant u_k = epoch + phase + k * period + lateness_k. A part-time counter
 * (window > 0) looks at the power only during the last `window` before each update and takes it for the whole period.
 */
#define _GNU_SOURCE
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { OK = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NO_PERMISSION = 4, NOT_FOUND = 6,
       INSUFFICIENT_SIZE = 7, DRIVER_NOT_LOADED = 9, GPU_IS_LOST = 15 };
enum { MAX_GPUS = 8, MAX_MIGS = 7, MAX_FAULTS = 64, MAX_PIDS = 16, TEXT = 96 };

typedef int64_t ns_t;
typedef struct { double t, w, e; } point_t;                        /* seconds from the wave's start, watts, joules up to here */
typedef struct { char kind[24]; ns_t t0, t1; double arg; } fault_t; /* in force for t0 <= t < t1 (epoch-relative) */
typedef struct { char uuid[TEXT]; } mig_t;
typedef struct {
    int index;
    char name[TEXT], uuid[TEXT];
    unsigned bus, limit_mw, temperature_c, sm_clock_mhz, architecture, memory_bus_bits, memory_clock_mhz;
    unsigned long long throttle;
    int energy_supported, instant_supported, power_supported, pids_denied, mig_mode, limits_told;
    ns_t period, phase, jitter, window, power_period, instant_window, average_window;
    double quantum_mj, gain, base_j, traffic_b_per_j;
    ns_t cost;
    int n_points, cap_points, repeat;
    point_t *points;
    int n_seen, cap_seen;
    double *seen; /* a part-time counter's joules after each update, filled as far as was asked */
    int n_faults, n_pids, n_migs;
    fault_t faults[MAX_FAULTS];
    long pids[MAX_PIDS]; /* 0 stands for the calling process */
    mig_t migs[MAX_MIGS];
} gpu_t;

static gpu_t gpus[MAX_GPUS];
static int n_gpus, configured, n_reloads, cost_sleeps, serialise;
static fault_t reloads[MAX_FAULTS]; /* the driver is away: every handle dies, counters start at zero again */
static uint64_t seed;
static ns_t epoch, virtual_now = -1, initialised_at;
static int references;
static long n_calls, n_inits;
static char driver[TEXT] = "555.00.sim";
static pthread_mutex_t driver_lock = PTHREAD_MUTEX_INITIALIZER, table_lock = PTHREAD_MUTEX_INITIALIZER;

/* ---- time ---- */

static ns_t monotonic(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (ns_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

ns_t sim_now_ns(void) { ns_t now = __atomic_load_n(&virtual_now, __ATOMIC_SEQ_CST); return now >= 0 ? now : monotonic(); }
void sim_set_time_ns(ns_t now) { __atomic_store_n(&virtual_now, now, __ATOMIC_SEQ_CST); } /* negative: the real clock again */
ns_t sim_epoch_ns(void) { return epoch; }
int sim_references(void) { return references; } /* nvmlInit minus nvmlShutdown */
long sim_inits(void) { return n_inits; }        /* times that the library went from closed to open */
long sim_calls(void) { return __atomic_load_n(&n_calls, __ATOMIC_SEQ_CST); } /* readings of energy and power */

static void spend(ns_t cost) { /* a call's duration: virtual time moves by it */
    if (cost <= 0) return;
    if (virtual_now >= 0) { __atomic_add_fetch(&virtual_now, cost, __ATOMIC_SEQ_CST); return; }
    ns_t end = monotonic() + cost;
    if (cost_sleeps) {
        struct timespec until = {end / 1000000000, end % 1000000000};
        clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL);
    } else while (monotonic() < end) {}
}

/* ---- the waveform: piecewise linear, known once ---- */

static double wave_energy(const gpu_t *g, double x) { /* joules from the wave's start to x seconds */
    int last = g->n_points - 1;
    double whole = 0;
    if (x <= 0 || last < 0) return 0;
    if (g->repeat && g->points[last].t > 0) {
        double n = floor(x / g->points[last].t);
        whole = n * g->points[last].e;
        x -= n * g->points[last].t;
    }
    if (x >= g->points[last].t) return whole + g->points[last].e + g->points[last].w * (x - g->points[last].t);
    int lo = 0, hi = last; /* points[lo].t <= x < points[hi].t */
    while (hi - lo > 1) { int mid = (lo + hi) / 2; if (g->points[mid].t <= x) lo = mid; else hi = mid; }
    const point_t *a = &g->points[lo], *b = &g->points[hi];
    double dx = x - a->t, slope = b->t > a->t ? (b->w - a->w) / (b->t - a->t) : 0;
    return whole + a->e + (a->w + 0.5 * slope * dx) * dx;
}

static double energy_at(const gpu_t *g, ns_t t) { return wave_energy(g, (double)(t - epoch) * 1e-9); }

double sim_truth_j(int gpu, ns_t t0, ns_t t1) { return energy_at(&gpus[gpu], t1) - energy_at(&gpus[gpu], t0); }

static double mean_power(const gpu_t *g, ns_t t, ns_t window) {
    if (window < 1000) window = 1000; /* "instant": over a microsecond */
    if (t - window < epoch) window = t - epoch;
    return window <= 0 ? (g->n_points ? g->points[0].w : 0) : (energy_at(g, t) - energy_at(g, t - window)) / ((double)window * 1e-9);
}

/* ---- the counter ---- */

static double uniform(uint64_t a, uint64_t b) { /* a hash to [0, 1): splitmix64 */
    uint64_t z = seed + a * 0x9E3779B97F4A7C15u + (b + 1) * 0xD1B54A32D192ED03u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return (double)((z ^ (z >> 31)) >> 11) / 9007199254740992.0;
}

static ns_t update_instant(const gpu_t *g, int64_t k) {
    ns_t late = g->jitter > 0 ? (ns_t)(uniform((uint64_t)g->index, (uint64_t)k) * (double)g->jitter) : 0;
    return epoch + g->phase + k * g->period + late;
}

static int64_t last_update(const gpu_t *g, ns_t t) { /* index of the last update at or before t; -1 before the first */
    ns_t x = t - epoch - g->phase;
    if (x < 0) return -1;
    int64_t k = x / g->period;
    return update_instant(g, k) <= t ? k : k - 1;
}

static double seen_at(gpu_t *g, ns_t t) { /* joules that a faultless counter has taken in by t */
    if (g->period <= 0) return g->gain * energy_at(g, t);
    int64_t k = last_update(g, t);
    if (k < 0) return 0;
    if (g->window <= 0) return g->gain * energy_at(g, update_instant(g, k));
    pthread_mutex_lock(&table_lock);
    while (g->n_seen <= k) {
        if (g->n_seen == g->cap_seen) {
            g->cap_seen = g->cap_seen ? 2 * g->cap_seen : 1024;
            g->seen = realloc(g->seen, sizeof(double) * (size_t)g->cap_seen);
        }
        int64_t j = g->n_seen;
        ns_t now = update_instant(g, j), before = j ? update_instant(g, j - 1) : epoch;
        g->seen[j] = (j ? g->seen[j - 1] : 0) + mean_power(g, now, g->window) * (double)(now - before) * 1e-9;
        g->n_seen++;
    }
    double seen = g->gain * g->seen[k];
    pthread_mutex_unlock(&table_lock);
    return seen;
}

/* The instant of the counter's last update at or before t (faults apart). */
ns_t sim_last_update_ns(int gpu, ns_t t) {
    int64_t k = gpus[gpu].period > 0 ? last_update(&gpus[gpu], t) : 0;
    return gpus[gpu].period <= 0 ? t : k < 0 ? epoch : update_instant(&gpus[gpu], k);
}

static const fault_t *fault(const gpu_t *g, const char *kind, ns_t t) {
    for (int i = g->n_faults - 1; i >= 0; i--)
        if (!strcmp(g->faults[i].kind, kind) && g->faults[i].t0 <= t - epoch && t - epoch < g->faults[i].t1) return &g->faults[i];
    return NULL;
}

static unsigned long long counter_mj(gpu_t *g, ns_t t) {
    const fault_t *stuck = fault(g, "stuck", t);
    ns_t at = stuck ? epoch + stuck->t0 : t, reset = -1;
    for (int i = 0; i < g->n_faults; i++)
        if (!strcmp(g->faults[i].kind, "reset") && epoch + g->faults[i].t0 <= at && epoch + g->faults[i].t0 > reset) reset = epoch + g->faults[i].t0;
    for (int i = 0; i < n_reloads; i++)
        if (epoch + reloads[i].t0 <= at && epoch + reloads[i].t0 > reset) reset = epoch + reloads[i].t0;
    double joules = seen_at(g, at) + (reset >= 0 ? -seen_at(g, reset) : g->base_j);
    const fault_t *back = fault(g, "backwards", at);
    if (back) joules -= back->arg;
    if (joules < 0) joules = 0;
    return (unsigned long long)(floor(joules * 1000.0 / g->quantum_mj + 1e-6) * g->quantum_mj);
}

/* ---- configuration: "key value" for all, "gpu <i> key value..." for one ---- */

static int set_gpu(gpu_t *g, const char *key, char *rest) {
    double number = atof(rest);
    ns_t nanoseconds = llround(number * 1e9);
    if (!strcmp(key, "name")) snprintf(g->name, TEXT, "%s", rest);
    else if (!strcmp(key, "uuid")) snprintf(g->uuid, TEXT, "%s", rest);
    else if (!strcmp(key, "bus")) g->bus = (unsigned)number;
    else if (!strcmp(key, "power_limit_w")) g->limit_mw = (unsigned)lround(number * 1000);
    else if (!strcmp(key, "temperature_c")) g->temperature_c = (unsigned)number;
    else if (!strcmp(key, "sm_clock_mhz")) g->sm_clock_mhz = (unsigned)number;
    else if (!strcmp(key, "memory_bus_bits")) g->memory_bus_bits = (unsigned)number;
    else if (!strcmp(key, "memory_clock_mhz")) g->memory_clock_mhz = (unsigned)number;
    else if (!strcmp(key, "traffic_b_per_j")) g->traffic_b_per_j = number;
    else if (!strcmp(key, "architecture")) g->architecture = (unsigned)number;
    else if (!strcmp(key, "throttle")) g->throttle = (unsigned long long)number;
    else if (!strcmp(key, "energy_supported")) g->energy_supported = (int)number;
    else if (!strcmp(key, "instant_supported")) g->instant_supported = (int)number;
    else if (!strcmp(key, "power_supported")) g->power_supported = (int)number;
    else if (!strcmp(key, "limits_told")) g->limits_told = (int)number;
    else if (!strcmp(key, "pids_denied")) g->pids_denied = (int)number;
    else if (!strcmp(key, "mig_mode")) g->mig_mode = (int)number;
    else if (!strcmp(key, "period_s")) g->period = nanoseconds;
    else if (!strcmp(key, "phase_s")) g->phase = nanoseconds;
    else if (!strcmp(key, "jitter_s")) g->jitter = nanoseconds;
    else if (!strcmp(key, "window_s")) g->window = nanoseconds;
    else if (!strcmp(key, "power_period_s")) g->power_period = nanoseconds;
    else if (!strcmp(key, "instant_window_s")) g->instant_window = nanoseconds;
    else if (!strcmp(key, "average_window_s")) g->average_window = nanoseconds;
    else if (!strcmp(key, "quantum_mj")) g->quantum_mj = number;
    else if (!strcmp(key, "gain")) g->gain = number;
    else if (!strcmp(key, "base_j")) g->base_j = number;
    else if (!strcmp(key, "cost_s")) g->cost = nanoseconds;
    else if (!strcmp(key, "repeat")) g->repeat = (int)number;
    else if (!strcmp(key, "pid") && g->n_pids < MAX_PIDS) g->pids[g->n_pids++] = (long)number;
    else if (!strcmp(key, "mig") && g->n_migs < MAX_MIGS) {
        snprintf(g->migs[g->n_migs++].uuid, TEXT, "%s", rest);
    } else if (!strcmp(key, "point")) {
        point_t p = {0};
        if (sscanf(rest, "%lf %lf", &p.t, &p.w) != 2) return 0;
        if (g->n_points == g->cap_points) {
            g->cap_points = g->cap_points ? 2 * g->cap_points : 64;
            g->points = realloc(g->points, sizeof(point_t) * (size_t)g->cap_points);
        }
        if (g->n_points) {
            const point_t *before = &g->points[g->n_points - 1];
            if (p.t < before->t) return 0;
            p.e = before->e + 0.5 * (before->w + p.w) * (p.t - before->t);
        }
        g->points[g->n_points++] = p;
    } else if (!strcmp(key, "fault") && g->n_faults < MAX_FAULTS) {
        fault_t *f = &g->faults[g->n_faults++];
        double t0, t1;
        if (sscanf(rest, "%23s %lf %lf %lf", f->kind, &t0, &t1, &f->arg) != 4) return 0;
        f->t0 = llround(t0 * 1e9);
        f->t1 = llround(t1 * 1e9);
    } else return 0;
    return 1;
}

/* Replaces the configuration; returns 0, or the number of the first line that it does not understand. */
int sim_load(const char *text) {
    for (int i = 0; i < MAX_GPUS; i++) { free(gpus[i].points); free(gpus[i].seen); }
    memset(gpus, 0, sizeof gpus);
    n_gpus = n_reloads = cost_sleeps = serialise = references = 0;
    n_calls = n_inits = 0;
    seed = 1;
    epoch = 0;
    virtual_now = -1;
    configured = 1;
    char *copy = strdup(text), *save = NULL;
    int number = 0, bad = 0;
    for (char *line = strtok_r(copy, "\n", &save); line && !bad; line = strtok_r(NULL, "\n", &save)) {
        char key[32];
        int index, at = 0;
        number++;
        if (sscanf(line, "gpu %d %31s %n", &index, key, &at) == 2 && at && index >= 0 && index < MAX_GPUS) {
            gpu_t *g = &gpus[index];
            while (n_gpus <= index) {
                gpu_t *fresh = &gpus[n_gpus];
                fresh->index = n_gpus++;
                fresh->quantum_mj = fresh->gain = 1;
            }
            bad = !set_gpu(g, key, line + at);
        } else if (sscanf(line, "%31s %n", key, &at) == 1 && at) {
            char *rest = line + at;
            if (!strcmp(key, "epoch_ns")) epoch = atoll(rest);
            else if (!strcmp(key, "virtual_ns")) virtual_now = atoll(rest);
            else if (!strcmp(key, "seed")) seed = strtoull(rest, NULL, 10);
            else if (!strcmp(key, "cost_sleeps")) cost_sleeps = atoi(rest);
            else if (!strcmp(key, "serialise")) serialise = atoi(rest);
            else if (!strcmp(key, "driver")) snprintf(driver, TEXT, "%s", rest);
            else if (!strcmp(key, "reload") && n_reloads < MAX_FAULTS) {
                double t0, t1;
                bad = sscanf(rest, "%lf %lf", &t0, &t1) != 2;
                reloads[n_reloads].t0 = llround(t0 * 1e9);
                reloads[n_reloads++].t1 = llround(t1 * 1e9);
            } else bad = 1;
        } else bad = 1;
        if (bad) bad = number;
    }
    free(copy);
    return bad;
}

static void load_from_environment(void) {
    const char *path = getenv("SIMNVML_CONFIG");
    FILE *file = path ? fopen(path, "r") : NULL;
    if (!file) return;
    fseek(file, 0, SEEK_END);
    long size = ftell(file);
    rewind(file);
    char *text = calloc((size_t)size + 1, 1);
    if (fread(text, 1, (size_t)size, file) == (size_t)size && sim_load(text))
        fprintf(stderr, "simnvml: %s is not understood\n", path);
    free(text);
    fclose(file);
}

/* ---- the library: opening and closing ---- */

static int driver_away(ns_t t) {
    for (int i = 0; i < n_reloads; i++) if (epoch + reloads[i].t0 <= t && t < epoch + reloads[i].t1) return 1;
    return 0;
}

static int stale(ns_t t) { /* opened before a driver reload that has happened since */
    for (int i = 0; i < n_reloads; i++) if (initialised_at < epoch + reloads[i].t0 && epoch + reloads[i].t0 <= t) return 1;
    return 0;
}

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    if (!configured) load_from_environment();
    if (driver_away(sim_now_ns())) return DRIVER_NOT_LOADED;
    if (references++ == 0) { initialised_at = sim_now_ns(); n_inits++; }
    return OK;
}
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlInit(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) {
    if (references == 0) return UNINITIALIZED;
    references--;
    return OK;
}

const char *nvmlErrorString(int code) {
    switch (code) {
        case OK: return "Success";
        case UNINITIALIZED: return "Uninitialized";
        case INVALID_ARGUMENT: return "Invalid Argument";
        case NOT_SUPPORTED: return "Not Supported";
        case NO_PERMISSION: return "Insufficient Permissions";
        case NOT_FOUND: return "Not Found";
        case DRIVER_NOT_LOADED: return "Driver Not Loaded";
        case GPU_IS_LOST: return "GPU is lost";
        default: return "Unknown Error";
    }
}

/* A handle is good until the library is closed: it holds the opening's number, the GPU's place and the slice's. */
static void *handle_of(const gpu_t *g, int slice) { return (void *)((uintptr_t)n_inits << 12 | (uintptr_t)(g->index + 1) << 4 | (uintptr_t)(slice + 1)); }

static gpu_t *as_gpu(void *handle) {
    int index = (int)((uintptr_t)handle >> 4 & 0xFF) - 1;
    return (long)((uintptr_t)handle >> 12) == n_inits && index >= 0 && index < n_gpus ? &gpus[index] : NULL;
}

static mig_t *as_mig(void *handle) {
    gpu_t *g = as_gpu(handle);
    int slice = (int)((uintptr_t)handle & 0xF) - 1;
    return g && slice >= 0 && slice < g->n_migs ? &g->migs[slice] : NULL;
}

static int enter(void *handle, gpu_t **out) { /* the checks of every call on a device */
    ns_t now = sim_now_ns();
    if (references == 0 || stale(now)) return UNINITIALIZED;
    gpu_t *g = as_gpu(handle);
    if (!g) return INVALID_ARGUMENT;
    *out = g;
    if (fault(g, "lost", now)) return GPU_IS_LOST;
    const fault_t *error = fault(g, "error", now);
    return error ? (int)error->arg : OK;
}
#define ENTER gpu_t *g; int rc = enter(handle, &g); if (rc) return rc

/* A reading happens in the middle of its call; `serialise` makes calls wait for each other as the driver's lock does. */
static int measure(void *handle, gpu_t **g, ns_t *t, ns_t *rest) {
    if (serialise) pthread_mutex_lock(&driver_lock);
    __atomic_add_fetch(&n_calls, 1, __ATOMIC_SEQ_CST);
    int rc = enter(handle, g);
    if (rc) return rc;
    const fault_t *slow = fault(*g, "slow", sim_now_ns());
    ns_t cost = slow ? llround(slow->arg * 1e9) : (*g)->cost;
    spend(cost / 2);
    *rest = cost - cost / 2;
    *t = sim_now_ns();
    return enter(handle, g); /* it may have been lost meanwhile */
}
static int leave(int rc, ns_t rest) {
    spend(rest);
    if (serialise) pthread_mutex_unlock(&driver_lock);
    return rc;
}

/* ---- energy and power ---- */

static int read_energy(gpu_t *g, ns_t t, unsigned long long *out) {
    if (!g->energy_supported || fault(g, "not_supported", t)) return NOT_SUPPORTED;
    *out = counter_mj(g, t);
    return OK;
}

static int read_power(gpu_t *g, ns_t t, int instant, unsigned *out) {
    if (!(instant ? g->instant_supported : g->power_supported) || fault(g, "power_not_supported", t)) return NOT_SUPPORTED;
    ns_t at = g->power_period > 0 ? t - (t - epoch) % g->power_period : t;
    *out = (unsigned)lround(1000 * g->gain * mean_power(g, at, instant ? g->instant_window : g->average_window));
    return OK;
}

int nvmlDeviceGetTotalEnergyConsumption(void *handle, unsigned long long *out) {
    gpu_t *g; ns_t t = 0, rest = 0;
    int rc = measure(handle, &g, &t, &rest);
    return leave(rc ? rc : read_energy(g, t, out), rest);
}

int nvmlDeviceGetPowerUsage(void *handle, unsigned *out) {
    gpu_t *g; ns_t t = 0, rest = 0;
    int rc = measure(handle, &g, &t, &rest);
    return leave(rc ? rc : read_power(g, t, 0, out), rest);
}

typedef struct {
    uint32_t field, scope;
    int64_t timestamp, latency_us;
    uint32_t type, rc;
    union { unsigned ui; unsigned long long ull; double d; } value;
} field_t;

int nvmlDeviceGetFieldValues(void *handle, int count, field_t *fields) {
    gpu_t *g; ns_t t = 0, rest = 0;
    int rc = measure(handle, &g, &t, &rest);
    for (int i = 0; !rc && i < count; i++) {
        fields[i].timestamp = t / 1000;
        fields[i].type = fields[i].field == 83 ? 3 : 1;
        fields[i].rc = (uint32_t)(fields[i].field == 83 ? read_energy(g, t, &fields[i].value.ull)
            : fields[i].scope != 0 ? NOT_SUPPORTED
            : fields[i].field == 185 ? read_power(g, t, 0, &fields[i].value.ui)
            : fields[i].field == 186 ? read_power(g, t, 1, &fields[i].value.ui) : NOT_SUPPORTED);
    }
    return leave(rc, rest);
}

int nvmlDeviceGetEnforcedPowerLimit(void *handle, unsigned *out) {
    ENTER;
    const fault_t *cap = fault(g, "cap", sim_now_ns());
    *out = cap ? (unsigned)lround(cap->arg * 1000) : g->limit_mw;
    return *out ? OK : NOT_SUPPORTED;
}
int nvmlDeviceGetPowerManagementLimit(void *handle, unsigned *out) { return nvmlDeviceGetEnforcedPowerLimit(handle, out); }
int nvmlDeviceGetPowerManagementDefaultLimit(void *handle, unsigned *out) { ENTER; *out = g->limit_mw; return g->limit_mw ? OK : NOT_SUPPORTED; }
int nvmlDeviceGetPowerManagementLimitConstraints(void *handle, unsigned *min, unsigned *max) {
    ENTER;
    if (!g->limits_told) return NOT_SUPPORTED;
    *min = g->limit_mw / 4;
    *max = g->limit_mw;
    return g->limit_mw ? OK : NOT_SUPPORTED;
}
int nvmlDeviceSetPowerManagementLimit(void *handle, unsigned limit) { (void)limit; ENTER; return NO_PERMISSION; }

/* ---- who is there ---- */

int nvmlSystemGetDriverVersion(char *out, unsigned size) { snprintf(out, size, "%s", driver); return references ? OK : UNINITIALIZED; }
int nvmlSystemGetNVMLVersion(char *out, unsigned size) { snprintf(out, size, "12.%s", driver); return references ? OK : UNINITIALIZED; }
int nvmlSystemGetCudaDriverVersion(int *out) { *out = 12050; return references ? OK : UNINITIALIZED; }
int nvmlSystemGetCudaDriverVersion_v2(int *out) { return nvmlSystemGetCudaDriverVersion(out); }

int nvmlDeviceGetCount_v2(unsigned *out) {
    if (references == 0 || stale(sim_now_ns())) return UNINITIALIZED;
    *out = (unsigned)n_gpus;
    return OK;
}
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **out) {
    unsigned count;
    int rc = nvmlDeviceGetCount_v2(&count);
    if (rc) return rc;
    if (index >= count) return INVALID_ARGUMENT;
    gpu_t *g;
    *out = handle_of(&gpus[index], -1);
    return enter(*out, &g);
}
int nvmlDeviceGetHandleByUUID(const char *uuid, void **out) {
    gpu_t *g;
    if (references == 0 || stale(sim_now_ns())) return UNINITIALIZED;
    for (int i = 0; i < n_gpus; i++) {
        if (!strcmp(uuid, gpus[i].uuid)) { *out = handle_of(&gpus[i], -1); return enter(*out, &g); }
        for (int j = 0; j < gpus[i].n_migs; j++)
            if (!strcmp(uuid, gpus[i].migs[j].uuid)) { *out = handle_of(&gpus[i], j); return enter(*out, &g); }
    }
    return NOT_FOUND;
}
int nvmlDeviceGetHandleByPciBusId_v2(const char *bus_id, void **out) {
    gpu_t *g;
    for (int i = 0; i < n_gpus; i++) {
        char own[32];
        snprintf(own, sizeof own, "%08X:%02X:00.0", 0, gpus[i].bus);
        if (!strcasecmp(own, bus_id)) { *out = handle_of(&gpus[i], -1); return enter(*out, &g); }
    }
    return NOT_FOUND;
}
int nvmlDeviceGetName(void *handle, char *out, unsigned size) { ENTER; snprintf(out, size, "%s", g->name); return OK; }
int nvmlDeviceGetUUID(void *handle, char *out, unsigned size) {
    ENTER;
    snprintf(out, size, "%s", as_mig(handle) ? as_mig(handle)->uuid : g->uuid);
    return OK;
}
int nvmlDeviceGetIndex(void *handle, unsigned *out) { ENTER; *out = (unsigned)g->index; return OK; }
int nvmlDeviceGetMinorNumber(void *handle, unsigned *out) { return nvmlDeviceGetIndex(handle, out); }
int nvmlDeviceGetArchitecture(void *handle, unsigned *out) { ENTER; *out = g->architecture; return OK; }
int nvmlDeviceGetCudaComputeCapability(void *handle, int *major, int *minor) {
    ENTER;
    *major = g->architecture >= 9 ? (int)g->architecture : 8;
    *minor = 0;
    return OK;
}
typedef struct { char legacy[16]; unsigned domain, bus, device, id, subsystem; char bus_id[32]; } pci_t;
int nvmlDeviceGetPciInfo_v3(void *handle, pci_t *out) {
    ENTER;
    memset(out, 0, sizeof *out);
    out->bus = g->bus;
    snprintf(out->legacy, sizeof out->legacy, "%04X:%02X:00.0", 0, g->bus & 0xFFu);
    snprintf(out->bus_id, sizeof out->bus_id, "%08X:%02X:00.0", 0, g->bus & 0xFFu);
    return OK;
}

/* ---- how it is ---- */

int nvmlDeviceGetTemperature(void *handle, int sensor, unsigned *out) { (void)sensor; ENTER; *out = g->temperature_c; return OK; }
typedef struct { unsigned version, sensor; int value; } temperature_t;
int nvmlDeviceGetTemperatureV(void *handle, temperature_t *out) {
    ENTER;
    out->value = (int)g->temperature_c;
    return OK;
}
int nvmlDeviceGetClockInfo(void *handle, int type, unsigned *out) { (void)type; ENTER; *out = g->sm_clock_mhz; return g->sm_clock_mhz ? OK : NOT_SUPPORTED; }
int nvmlDeviceGetMaxClockInfo(void *handle, int type, unsigned *out) {
    if (type != 2) return nvmlDeviceGetClockInfo(handle, type, out);
    ENTER;
    *out = g->memory_clock_mhz;
    return g->memory_clock_mhz ? OK : NOT_SUPPORTED;
}
int nvmlDeviceGetMemoryBusWidth(void *handle, unsigned *out) { ENTER; *out = g->memory_bus_bits; return g->memory_bus_bits ? OK : NOT_SUPPORTED; }

/* ---- GPM: bytes to and from the memory go with the joules, `traffic_b_per_j` (0: no such counters) ---- */

typedef struct { ns_t t; const gpu_t *g; } sample_t;
typedef struct {
    unsigned version, count;
    sample_t *first, *second;
    struct { unsigned id; int rc; double value; const char *info[3]; } metric[1]; /* as many as the caller has room for */
} metrics_t;
static int n_samples;
int sim_samples(void) { return n_samples; } /* allocated, not freed */
int nvmlGpmQueryDeviceSupport(void *handle, unsigned out[2]) { ENTER; out[1] = g->traffic_b_per_j > 0; return OK; }
int nvmlGpmSampleAlloc(sample_t **out) { *out = calloc(1, sizeof **out); n_samples++; return OK; }
int nvmlGpmSampleFree(sample_t *sample) { free(sample); n_samples--; return OK; }
int nvmlGpmSampleGet(void *handle, sample_t *sample) {
    ENTER;
    if (g->traffic_b_per_j <= 0 || fault(g, "no_sample", sim_now_ns())) return NOT_SUPPORTED;
    sample->t = sim_now_ns();
    sample->g = g;
    return OK;
}
int nvmlGpmMetricsGet(metrics_t *asked) {
    const sample_t *a = asked->first, *b = asked->second;
    if (asked->version != 1 || asked->count != 1 || !a || !b || a->g != b->g || a->t >= b->t) return INVALID_ARGUMENT;
    double bytes = a->g->traffic_b_per_j * (energy_at(a->g, b->t) - energy_at(a->g, a->t));
    double most = 2e6 * a->g->memory_clock_mhz * a->g->memory_bus_bits / 8 * (double)(b->t - a->t) * 1e-9;
    asked->metric[0].rc = asked->metric[0].id == 10 ? OK : NOT_SUPPORTED;
    asked->metric[0].value = 100 * bytes / most;
    return OK;
}
int nvmlDeviceGetCurrentClocksThrottleReasons(void *handle, unsigned long long *out) { ENTER; *out = g->throttle; return OK; }
int nvmlDeviceGetCurrentClocksEventReasons(void *handle, unsigned long long *out) { ENTER; *out = g->throttle; return OK; }
int nvmlDeviceGetUtilizationRates(void *handle, unsigned out[2]) { ENTER; out[0] = 100; out[1] = 50; return OK; }
int nvmlDeviceGetMemoryInfo(void *handle, unsigned long long out[3]) {
    ENTER;
    out[0] = 80ull << 30;
    out[1] = 70ull << 30;
    out[2] = 10ull << 30;
    return OK;
}
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } memory_t;
int nvmlDeviceGetMemoryInfo_v2(void *handle, memory_t *out) {
    ENTER;
    out->total = 80ull << 30;
    out->reserved = 0;
    out->free = 70ull << 30;
    out->used = 10ull << 30;
    return OK;
}
int nvmlDeviceGetComputeMode(void *handle, unsigned *out) { ENTER; *out = 0; return OK; }
int nvmlDeviceGetPersistenceMode(void *handle, unsigned *out) { ENTER; *out = 1; return OK; }
int nvmlDeviceGetC2cModeInfoV(void *handle, void *out) { (void)out; ENTER; return NOT_SUPPORTED; }

typedef struct { unsigned pid; unsigned long long memory; unsigned gpu_instance, compute_instance; } process_t;
int nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned *count, process_t *out) {
    ENTER;
    if (g->pids_denied) return NO_PERMISSION;
    const fault_t *joined = fault(g, "joined", sim_now_ns());
    unsigned room = *count;
    *count = (unsigned)g->n_pids + (joined != NULL);
    if (room < *count) return INSUFFICIENT_SIZE;
    for (int i = 0; i < g->n_pids; i++)
        out[i] = (process_t){(unsigned)(g->pids[i] ? g->pids[i] : getpid()), 1ull << 30, ~0u, ~0u};
    if (joined) out[g->n_pids] = (process_t){(unsigned)joined->arg, 1ull << 30, ~0u, ~0u};
    return OK;
}
int nvmlDeviceGetComputeRunningProcesses_v2(void *handle, unsigned *count, process_t *out) {
    return nvmlDeviceGetComputeRunningProcesses_v3(handle, count, out);
}
int nvmlDeviceGetGraphicsRunningProcesses_v3(void *handle, unsigned *count, process_t *out) { (void)out; ENTER; *count = 0; return OK; }
int nvmlDeviceGetMPSComputeRunningProcesses_v3(void *handle, unsigned *count, process_t *out) { (void)out; ENTER; *count = 0; return OK; }

int nvmlDeviceGetMigMode(void *handle, unsigned *current, unsigned *pending) {
    ENTER;
    *current = *pending = (unsigned)g->mig_mode;
    return g->architecture >= 7 ? OK : NOT_SUPPORTED;
}
int nvmlDeviceIsMigDeviceHandle(void *handle, unsigned *out) { ENTER; *out = as_mig(handle) != NULL; return OK; }
int nvmlDeviceGetMaxMigDeviceCount(void *handle, unsigned *out) { ENTER; *out = g->mig_mode ? MAX_MIGS : 0; return OK; }
int nvmlDeviceGetMigDeviceHandleByIndex(void *handle, unsigned index, void **out) {
    ENTER;
    if ((int)index >= g->n_migs) return NOT_FOUND;
    *out = handle_of(g, (int)index);
    return OK;
}
int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(void *handle, void **out) {
    ENTER;
    if (!as_mig(handle)) return INVALID_ARGUMENT;
    *out = handle_of(g, -1);
    return OK;
}
