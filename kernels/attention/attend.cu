// Attention of one token over a cache that is read by clusters.
#include "attention/attend.cuh"

KERNELS(attend, false)
