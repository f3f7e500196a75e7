// Refusals for the kernels: plain arguments in, so that no std::string is built where every instruction set compiles.
#pragma once

#include <cstdint>

#include "view.h"

namespace blip3o_fast {

// "<name> must <needed>, got <given>"
[[noreturn]] void refuse_number(const char* name, const char* needed, int64_t given);

// refuse(view, needed), and the same with a number between two pieces of text
[[noreturn]] void refuse_tensor(const View& view, const char* needed);
[[noreturn]] void refuse_tensor(const View& view, const char* before, int64_t number, const char* after);

// refuse(view, "of shape <wanted's>")
[[noreturn]] void refuse_shape(const View& view, const View& wanted);

}  // namespace blip3o_fast
