/* The products whose weights are numbers of the kind. */
#define PRODUCT(op) NAME(op)
#include "native_products.h"
