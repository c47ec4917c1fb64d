// What the machine that runs this can do.
#pragma once

namespace vtts {

// Instruction sets with kernels of their own; kAuto takes the best that is supported. Each of x86
// includes those before it: an operation without kernels for the one runs those of another.
enum class Isa { kAuto, kScalar, kAvx2, kAvx512, kAvx512Bf16, kAmx, kNeon };

const char* isa_name(Isa isa);

// Whether this build and this machine can run `isa`.
bool isa_supported(Isa isa);

// Throws std::invalid_argument ("<what>: isa must be ...") unless `isa` is supported; kAuto
// becomes the best that is.
Isa resolve_isa(const char* what, Isa isa);

}  // namespace vtts
