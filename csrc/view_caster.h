// From Python's description of a tensor, (address, dtype code, shape, strides), to a View. Whatever is wrong in it
// becomes a ValueError that names the argument: a wrong call must not crash the process.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <string>
#include <tuple>
#include <utility>

#include "view.h"

namespace blip3o_fast {

namespace py = pybind11;

[[noreturn]] inline void refuse_argument(const char* name, const std::string& problem) {
    throw std::invalid_argument(std::string(name) + " " + problem);
}

template <class T>
T convert_number(py::handle value, const char* name) {
    py::detail::make_caster<T> caster;
    if (!caster.load(value, true)) {
        const char* needed = std::is_integral_v<T> ? "must be an int in range, got " : "must be a number, got ";
        refuse_argument(name, needed + std::string(py::str(py::type::of(value))));
    }
    return py::detail::cast_op<T>(caster);
}

inline View convert_view(py::handle value, const char* name) {
    View view;
    view.name = name;
    if (value.is_none()) return view;
    if (!PyTuple_Check(value.ptr()) || PyTuple_GET_SIZE(value.ptr()) != 4)
        refuse_argument(name, "must be (address, dtype, shape, strides) or None");
    const auto parts = py::reinterpret_borrow<py::tuple>(value);
    if (!PyLong_Check(parts[0].ptr())) refuse_argument(name, "must have an int as its address");
    const auto address = convert_number<uintptr_t>(parts[0], name);
    const auto dtype = convert_number<int>(parts[1], name);
    if (dtype < 0 || dtype >= dtype_count) refuse_argument(name, "has an unknown dtype code " + std::to_string(dtype));
    view.dtype = static_cast<Dtype>(dtype);
    // torch.Size is a tuple too
    if (!PyTuple_Check(parts[2].ptr()) || !PyTuple_Check(parts[3].ptr()))
        refuse_argument(name, "must have tuples as its shape and strides");
    const auto shape = py::reinterpret_borrow<py::tuple>(parts[2]);
    const auto strides = py::reinterpret_borrow<py::tuple>(parts[3]);
    if (shape.size() != strides.size() || shape.size() > max_rank)
        refuse_argument(name, "must have as many strides as sizes, at most " + std::to_string(max_rank));
    view.rank = static_cast<int>(shape.size());
    const int64_t item = item_size(view.dtype), limit = int64_t{1} << 46;  // elements and bytes stay far below overflow
    int64_t extent = 1, nonzero = 1;  // elements that the strides reach over; the product of the sizes that are not 0
    for (int i = 0; i < view.rank; ++i) {
        view.size[i] = convert_number<int64_t>(shape[i], name);
        view.stride[i] = convert_number<int64_t>(strides[i], name);
        if (view.size[i] < 0 || view.stride[i] < 0 || view.size[i] > limit || view.stride[i] > limit)
            refuse_argument(name, "has a size or stride that is negative or too large");
        if (view.size[i] > 0 && nonzero > limit / view.size[i])
            refuse_argument(name, "has more elements than memory can hold");
        nonzero *= view.size[i] > 0 ? view.size[i] : 1;
    }
    bool empty = false;
    for (int i = 0; i < view.rank; ++i) empty = empty || view.size[i] == 0;
    for (int i = 0; i < view.rank && !empty; ++i) {
        if (view.size[i] > 1 && view.stride[i] > limit / (view.size[i] - 1))
            refuse_argument(name, "has a size or stride that is negative or too large");
        extent += (view.size[i] - 1) * view.stride[i];
        if (extent > limit) refuse_argument(name, "has a size or stride that is negative or too large");
    }
    if (!empty && address == 0) refuse_argument(name, "has a null address");
    if (!empty && address % static_cast<uintptr_t>(item) != 0)
        refuse_argument(name, "is not aligned to its elements of " + std::to_string(item) + " bytes");
    if (view.rank > 0) view.last_stride = view.stride[view.rank - 1];
    view.data = reinterpret_cast<void*>(address);
    return view;
}

template <class T>
T convert_argument(py::handle value, const char* name) {
    if constexpr (std::is_same_v<T, View>) {
        return convert_view(value, name);
    } else {
        return convert_number<T>(value, name);
    }
}

// Calls f(lead, arguments...) with the GIL released; args are checked against the parameters' types and names.
template <class Lead, class R, class... A, size_t... I>
R call_with(R (*f)(const Lead&, A...), const Lead& lead, const py::args& args,
            const std::array<const char*, sizeof...(A)>& names, std::index_sequence<I...>) {
    if (args.size() != sizeof...(A))
        throw std::invalid_argument("takes " + std::to_string(sizeof...(A)) + " arguments, got " +
                                    std::to_string(args.size()));
    std::tuple<std::decay_t<A>...> values{convert_argument<std::decay_t<A>>(args[I], names[I])...};
    py::gil_scoped_release release;
    return f(lead, std::get<I>(values)...);
}

template <class Lead, class R, class... A>
R call_with(R (*f)(const Lead&, A...), const Lead& lead, const py::args& args,
            const std::array<const char*, sizeof...(A)>& names) {
    return call_with(f, lead, args, names, std::index_sequence_for<A...>{});
}

}  // namespace blip3o_fast
