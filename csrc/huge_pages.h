// Large memory in large pages.
#pragma once

#include <cstdint>

namespace blip3o_fast {

// Asks for pages of 2 MB in memory that nobody has touched yet. Only advice: where the system does not know it, nothing
// happens. False where the system refused.
bool advise_huge_pages(uintptr_t address, int64_t bytes);

}  // namespace blip3o_fast
