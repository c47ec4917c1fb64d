// Adds patchify and patch_embed to vtts_rt._C. Their arrays come through the buffer protocol.
#pragma once

#include <pybind11/pybind11.h>

void bind_patchify(pybind11::module_& m);
