// Two stacks that one operating system's thread changes between.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulation {

#if defined(__x86_64__)

// Keeps the registers that a call must not change on the stack, and the stack's address in `left`.
extern "C" void blip3o_switch_stacks(void** left, void* entered);
asm(R"(
.text
.type blip3o_switch_stacks, @function
blip3o_switch_stacks:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size blip3o_switch_stacks, .-blip3o_switch_stacks
)");

class Fiber {
public:
    // The next switch to it calls `entry`, which must not return.
    void prepare(void* stack, size_t bytes, void (*entry)()) {
        auto* top = reinterpret_cast<uintptr_t*>((reinterpret_cast<uintptr_t>(stack) + bytes) / 16 * 16);
        *--top = 0;  // entry's return address; keeps the stack as a call leaves it
        *--top = reinterpret_cast<uintptr_t>(entry);
        for (int i = 0; i < 6; ++i) *--top = 0;
        stack_ = top;
    }

    void switch_to(Fiber& other) { blip3o_switch_stacks(&stack_, other.stack_); }

private:
    void* stack_ = nullptr;
};

#else

class Fiber {
public:
    void prepare(void* stack, size_t bytes, void (*entry)()) {
        getcontext(&context_);
        context_.uc_stack.ss_sp = stack;
        context_.uc_stack.ss_size = bytes;
        context_.uc_link = nullptr;
        makecontext(&context_, entry, 0);
    }

    void switch_to(Fiber& other) { swapcontext(&context_, &other.context_); }

private:
    ucontext_t context_;
};

#endif

}  // namespace emulation
