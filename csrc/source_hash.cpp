// In a file of its own: it is compiled anew after every change of a source, and bindings.cpp takes long.
#include "source_hash.h"

namespace blip3o_fast {

const char* source_hash() { return BLIP3O_FAST_SOURCE_HASH; }

}  // namespace blip3o_fast
