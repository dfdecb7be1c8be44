// The same over a cache whose clustered tokens are product codes.
#include "attention/attend.cuh"

KERNELS(attend_coded, true)
