"""One command that proves `dpo` on an NVIDIA GPU, in eight minutes: right, bill, speed, sampling, in order of worth.

    make gpu-kit && make gpu           on a machine with a CUDA torch (kit.py says what else it needs)
    python benchmarks/gpu              the same where all packages are installed
    python benchmarks/gpu --device cpu the rehearsal: every check on tiny shapes, on one core

    __main__.py   the command: parts, time, tables, exit code
    runner.py     a check as a process of its own, its deadline, and its lines in results.jsonl
    right.py      scoring on the device: head, shared prompts, attention, adapted layers
    trainings.py  the rest of the part `right`: whole trainings, against TRL, killed, out of memory
    bill.py       the memory bill against measured peaks, and cards imitated by a memory limit
    speed.py      tokens a second against the peers' trainers, the share of the floor, and the time by kernel
    peer.py       the trainers of flash-pref and Unsloth, each in a process of its own
    sampling.py   tokens a second of answers
    kit.py        the wheels that the machine lacks; packages.txt: what it has

README.md lists the branches of dpo that only a GPU runs, with the check that covers each. dpo has no Triton kernels of its own:
those of TRL and liger-kernel run here as their packages have them.
"""
