#include "refuse.h"

#include <stdexcept>
#include <string>

namespace blip3o_fast {

void refuse_number(const char* name, const char* needed, int64_t given) {
    throw std::invalid_argument(std::string(name) + " must " + needed + ", got " + std::to_string(given));
}

void refuse_tensor(const View& view, const char* needed) { refuse(view, needed); }

void refuse_tensor(const View& view, const char* before, int64_t number, const char* after) {
    refuse(view, before + std::to_string(number) + after);
}

void refuse_shape(const View& view, const View& wanted) { refuse(view, "of shape " + shape_text(wanted)); }

}  // namespace blip3o_fast
