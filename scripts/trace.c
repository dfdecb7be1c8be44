// Records when every kernel, copy, fill and driver call of a program begins and ends, for scripts/timeline.py. It needs
// CUPTI, which comes with the CUDA toolkit:
//
//     gcc -O1 -shared -fPIC -I$CUDA_HOME/include -I$CUDA_HOME/extras/CUPTI/include scripts/trace.c -o trace.so -lcupti
//     CUDA_INJECTION64_PATH=$PWD/trace.so TRACE=trace.csv target/release/examples/bench run --device cuda
//
// Lines are: kernel, copy, fill or host; its name; begin and end in nanoseconds.
#include <cupti.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

static FILE *out;

static void write_line(const char *kind, const char *name, uint64_t begin, uint64_t end) {
    fprintf(out, "%s,%s,%llu,%llu\n", kind, name, (unsigned long long)begin, (unsigned long long)end);
}

static void give_buffer(uint8_t **buffer, size_t *size, size_t *records) {
    *size = 8 << 20;
    *buffer = aligned_alloc(8, *size);
    *records = 0;
}

static void take_buffer(CUcontext context, uint32_t stream, uint8_t *buffer, size_t size, size_t valid) {
    CUpti_Activity *record = NULL;
    while (cuptiActivityGetNextRecord(buffer, valid, &record) == CUPTI_SUCCESS) {
        if (record->kind == CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) {
            const CUpti_ActivityKernel9 *kernel = (const CUpti_ActivityKernel9 *)record;
            write_line("kernel", kernel->name, kernel->start, kernel->end);
        } else if (record->kind == CUPTI_ACTIVITY_KIND_MEMCPY) {
            const CUpti_ActivityMemcpy5 *copy = (const CUpti_ActivityMemcpy5 *)record;
            write_line("copy", "", copy->start, copy->end);
        } else if (record->kind == CUPTI_ACTIVITY_KIND_MEMSET) {
            const CUpti_ActivityMemset4 *fill = (const CUpti_ActivityMemset4 *)record;
            write_line("fill", "", fill->start, fill->end);
        } else if (record->kind == CUPTI_ACTIVITY_KIND_DRIVER) {
            const CUpti_ActivityAPI *call = (const CUpti_ActivityAPI *)record;
            const char *name = "";
            cuptiGetCallbackName(CUPTI_CB_DOMAIN_DRIVER_API, call->cbid, &name);
            write_line("host", name, call->start, call->end);
        }
    }
    free(buffer);
}

static void finish(void) {
    cuptiActivityFlushAll(1);
    fclose(out);
}

/// Called by the driver when it loads the library.
int InitializeInjection(void) {
    const char *path = getenv("TRACE");
    out = fopen(path ? path : "trace.csv", "w");
    if (!out) return 0;
    cuptiActivityRegisterCallbacks(give_buffer, take_buffer);
    cuptiActivityEnable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL);
    cuptiActivityEnable(CUPTI_ACTIVITY_KIND_MEMCPY);
    cuptiActivityEnable(CUPTI_ACTIVITY_KIND_MEMSET);
    cuptiActivityEnable(CUPTI_ACTIVITY_KIND_DRIVER);
    atexit(finish);
    return 1;
}
