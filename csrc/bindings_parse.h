// What the bindings take as words.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/cpu_features.h"

template <typename Enum>
Enum parse(const std::string& what, const std::string& argument, const std::string& value,
           const std::vector<std::pair<std::string, Enum>>& choices) {
  std::string names;
  for (const auto& [name, choice] : choices) {
    if (name == value) return choice;
    names += (names.empty() ? "" : ", ") + name;
  }
  throw std::invalid_argument(what + ": " + argument + " must be one of " + names + ", got " +
                              value);
}

inline vtts::Isa parse_isa(const std::string& what, const std::string& isa) {
  if (isa == "auto") return vtts::Isa::kAuto;
  return parse<vtts::Isa>(what, "isa", isa,
                          {{"auto", vtts::Isa::kAuto},
                           {"scalar", vtts::Isa::kScalar},
                           {"avx2", vtts::Isa::kAvx2},
                           {"avx512", vtts::Isa::kAvx512},
                           {"avx512_bf16", vtts::Isa::kAvx512Bf16},
                           {"amx", vtts::Isa::kAmx},
                           {"neon", vtts::Isa::kNeon}});
}
