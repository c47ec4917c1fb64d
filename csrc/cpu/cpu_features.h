// What the machine that runs this can do.
#pragma once

namespace vtts {

bool cpu_has_avx2_fma();

}  // namespace vtts
