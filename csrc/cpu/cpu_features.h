// What the machine that runs this can do.
#pragma once

namespace vtts {

// Instruction sets with kernels of their own; kAuto takes the best that is supported. AVX-512
// includes AVX2: an operation without kernels for the one runs those of the other.
enum class Isa { kAuto, kScalar, kAvx2, kAvx512, kNeon };

// Whether the processor is Intel's own: libraries by Intel choose their code by that.
bool cpu_is_intel();

const char* isa_name(Isa isa);

// Whether this build and this machine can run `isa`.
bool isa_supported(Isa isa);

// Throws std::invalid_argument ("<what>: isa must be ...") unless `isa` is supported; kAuto
// becomes the best that is.
Isa resolve_isa(const char* what, Isa isa);

}  // namespace vtts
