/* vtts: the native parts of vtts_rt for C and C++. docs/c_api.md shows how to use them. */
#ifndef VTTS_VTTS_H_
#define VTTS_VTTS_H_

#include "vtts/base.h"
#include "vtts/dlpack.h"
#include "vtts/patchify.h"

#endif /* VTTS_VTTS_H_ */
