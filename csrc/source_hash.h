#pragma once

namespace blip3o_fast {

// Of the sources that this was built from (blip3o_fast/_ext.py), given by setup.py.
const char* source_hash();

}  // namespace blip3o_fast
