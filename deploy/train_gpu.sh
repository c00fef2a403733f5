#!/bin/bash
# Make the data, train and evaluate a model on one node, in one go. After a stop, the same command continues.
#
#   deploy/train_gpu.sh OUTPUT [FIELDS [PROCESSES]]
#
# OUTPUT     folder for data/ (shards), a folder per network (checkpoint, curves.png, model.pt), validation.json and
#            shifted.json; the model.pt of the last network holds all networks
# FIELDS     simulated fields; with the default, the training fields alone hold more than the paper's sample
# PROCESSES  processes that make the data; the default is one per core
#
# From the environment: DEVICE (cuda, or cpu), ARCHITECTURES ("bands resnet50": one network of each, which answer
# together), EPOCHS (50), GPUS (1; more use torchrun), BATCH (512 per GPU), SEED of the data. Needs Python 3.11 or later
# with this package and its extras:
#   pip install '.[train,simulate]'    (torch, torchvision, numpy, scipy, astropy, pyarrow, galsim, skypy, speclite)
# It downloads nothing while it runs. With Debian's sextractor, seven of ten fields have SExtractor's catalogues.
set -euo pipefail

if [[ $# -lt 1 || $# -gt 3 ]]; then
    sed -n '4,15s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
output=$1
fields=${2:-1800}
processes=${3:-$(nproc)}
device=${DEVICE:-cuda}
architectures=${ARCHITECTURES:-bands resnet50}
epochs=${EPOCHS:-50}
gpus=${GPUS:-1}
batch=${BATCH:-512}
seed=${SEED:-20260}

data=$output/data
mkdir -p "$output"

# One thread per process: more would only wait for each other.
OMP_NUM_THREADS=1 sgclassify dataset --output "$data" --fields "$fields" --shifted $(((fields + 15) / 16)) \
    --seed "$seed" --processes "$processes"

precision=fp32
if [[ $device == cuda* ]]; then precision=bf16; fi
start=(sgclassify)
if [[ $gpus -gt 1 ]]; then start=(torchrun --standalone --nproc-per-node "$gpus" --no-python sgclassify); fi
beside=()
number=0
for architecture in $architectures; do
    number=$((number + 1))
    model=$output/$architecture
    "${start[@]}" train --data "$data" --output "$model" --device "$device" --precision "$precision" \
        --architecture "$architecture" --seed "$number" "${beside[@]}" \
        --sequence-epochs "$epochs" --small-epochs 0 --epochs "$epochs" --batch-size "$batch" --resume
    beside=(--beside "$model/model.pt")
done

# The calibration is judged with the share of stars in the data.
sgclassify evaluate --data "$data" --part validation --prior-star-fraction 0.41 --model "$model/model.pt" \
    --json "$output/validation.json"
sgclassify evaluate --data "$data" --part shifted --prior-star-fraction 0.5 --model "$model/model.pt" \
    --json "$output/shifted.json"
echo "weights: $model/model.pt and its .sha256; learning curves: curves.png beside them"
