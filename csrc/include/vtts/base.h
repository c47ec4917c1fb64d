/* Status codes, errors, versions: what every part of vtts.h shares. C99 and C++.
 *
 * Rules of the whole interface
 * - Every function that can fail returns a vtts_status and throws nothing;
 *   vtts_last_error_message() says why: "<what>: <argument> must be <rule>, got <value>". Arguments
 *   are checked before anything is written.
 * - The caller allocates, the library borrows for the time of the call. The exception is a
 *   DLManagedTensorVersioned, which is freed by its own deleter.
 * - Functions are thread-safe unless they say otherwise.
 * - Structures that can grow begin with `struct_size`: fill them with their *_default() or set
 *   struct_size = sizeof(it). A caller compiled with an older header is understood: fields it does
 *   not know take their defaults. A caller with a newer header is understood as long as the fields
 *   that this library does not know are zero. Structures without struct_size never change.
 * - Sizes and counts are int64_t, texts are bytes with a length, strings that are returned are
 *   UTF-8 and end in a zero.
 */
#ifndef VTTS_BASE_H_
#define VTTS_BASE_H_

#include <stdint.h>

#if defined(_WIN32)
#define VTTS_API
#elif defined(__GNUC__)
#define VTTS_API __attribute__((visibility("default")))
#else
#define VTTS_API
#endif

/* Major in the upper 16 bits: it changes when a caller must be compiled anew, and so does the
 * SONAME (libvtts.so.<major>). Minor in the lower: it grows when something is added. */
#define VTTS_ABI_MAJOR 1
#define VTTS_ABI_MINOR 0
#define VTTS_ABI_VERSION (((uint32_t)VTTS_ABI_MAJOR << 16) | (uint32_t)VTTS_ABI_MINOR)

#ifdef __cplusplus
extern "C" {
#endif

typedef enum vtts_status {
  VTTS_OK = 0,
  VTTS_ERROR_INVALID_ARGUMENT = 1, /* the caller's mistake */
  VTTS_ERROR_UNSUPPORTED = 2,      /* this build or this machine cannot do it */
  VTTS_ERROR_CUDA = 3,             /* CUDA failed; the message is CUDA's */
  VTTS_ERROR_OUT_OF_MEMORY = 4,    /* of the host */
  VTTS_ERROR_INTERNAL = 5,         /* a fault of the library */
  VTTS_STATUS_FORCE_INT32 = 0x7fffffff
} vtts_status;

/* VTTS_ABI_VERSION of the library that runs. Never fails. */
VTTS_API uint32_t vtts_abi_version(void);

/* "0.1.0": version of the package that the library came with. Never fails; static. */
VTTS_API const char* vtts_version(void);

/* Whether the library was built with CUDA: 1 or 0. Never fails. */
VTTS_API int32_t vtts_has_cuda(void);

/* The name of a status, "VTTS_OK"; "unknown" for other numbers. Never fails; static. */
VTTS_API const char* vtts_status_name(vtts_status status);

/* Why the last call of this thread that failed did so; "" before the first. Owned by the library,
 * valid until the next call of this thread that fails. */
VTTS_API const char* vtts_last_error_message(void);

#ifdef __cplusplus
}
#endif

#endif /* VTTS_BASE_H_ */
