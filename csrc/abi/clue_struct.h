// vtts_clue from and to the core's Clue.
#pragma once

#include "core/clue.h"
#include "vtts/clue.h"

namespace vtts::abi {

vtts_clue to_struct(const Clue& clue);

// Throws std::invalid_argument on a wrong size or count.
Clue from_struct(const vtts_clue* clue, const char* what);

}  // namespace vtts::abi
