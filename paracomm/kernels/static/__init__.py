"""What a kernel will cost on a GPU that is not there: it is compiled ahead of time, and its machine code is read.

    case       what to compile: a kernel, the types of its arguments, its constants
    compile    Case -> Binary: cubin, registers, stack, shared memory
    sass       machine code -> instruction mix and loops
    model      occupancy, and the share of the tensor cores' peak by the loops
    shipped    every kernel at every configuration of the tables, from *_cases
    golden     all of it for every shipped case; the golden table
    tune       candidates -> tables: `paracomm tune kernels`, which prints the figures too (--estimate)

Everything printed from here is static: a count or an estimate from code, nothing that was measured.
"""
