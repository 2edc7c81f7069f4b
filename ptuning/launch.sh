# For the scripts beside it: how main.py is started, and the files that DATA names. Sets LAUNCH, TRAIN_DATA, DEV_DATA.

stop() { echo "error: $*" >&2; exit 2; }

# need_gpus N ARGUMENTS...: stops if there are fewer GPUs, unless the arguments train on a CPU.
need_gpus() {
    local gpus=$1 word
    shift
    for word in "$@"; do case $word in --use_cpu | --no_cuda) return 0 ;; esac; done
    python3 -c 'import sys, torch; sys.exit(torch.cuda.device_count() < int(sys.argv[1]))' "$gpus" ||
        stop "NUM_GPUS=$gpus, but there are fewer GPUs here: lower it, or add --use_cpu --ddp_backend gloo"
}

# launch N ARGUMENTS...: one process, or one for each of N GPUs.
launch() {
    LAUNCH=(python3)
    if [ "$1" -gt 1 ]; then
        need_gpus "$@"
        LAUNCH=(torchrun --standalone --nnodes=1 --nproc-per-node="$1")
    fi
}

# data PATH: a folder with train.json and dev.json, or one file for both.
data() {
    if [ -d "$1" ]; then
        TRAIN_DATA=$1/train.json DEV_DATA=$1/dev.json
    else
        TRAIN_DATA=$1 DEV_DATA=$1
    fi
}
