/* Products of many rows, whatever they run on: rows are packed, and meet two columns of tiles at a time. */
#ifdef VECTOR_TILES
#include "vector_products.h"
#else
#include "amx_products.h"
#endif
