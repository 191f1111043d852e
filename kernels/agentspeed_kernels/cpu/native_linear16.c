/* The products of rows of float with weights in bf16: half of the bytes are read, and no number is another. */
#ifndef HALF
#define WEIGHTS16
#define PRODUCT(op) NAME(op##_16)
#include "native_products.h"
#endif
