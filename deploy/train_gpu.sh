#!/bin/bash
# Make the data, train and evaluate a model on one node: everything from nothing, in one go, and on again after a stop.
#
#   deploy/train_gpu.sh OUTPUT [FIELDS [PROCESSES]]
#
# OUTPUT     folder for data/ (shards), model/ (checkpoint, curves.png, model.pt), validation.json and shifted.json
# FIELDS     simulated fields; of the default the training fields alone hold more than the paper's sample
# PROCESSES  that make the data; the default is one a core
#
# From the environment: DEVICE (cuda, or cpu), ARCHITECTURE (bands, or the paper's resnet50), EPOCHS (50), GPUS (one by
# default; more by torchrun), BATCH (512 a GPU), SEED of the data. Needs Python 3.11 or later with this package and its extras:
#   pip install '.[train,simulate]'    (torch, torchvision, numpy, scipy, astropy, pyarrow, galsim, skypy, speclite)
# Nothing is downloaded while it runs. Debian's sextractor and psfex are used where installed, for the baselines only.
set -euo pipefail

if [[ $# -lt 1 || $# -gt 3 ]]; then
    sed -n '4,13s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
output=$1
fields=${2:-1800}
processes=${3:-$(nproc)}
device=${DEVICE:-cuda}
architecture=${ARCHITECTURE:-bands}
epochs=${EPOCHS:-50}
gpus=${GPUS:-1}
batch=${BATCH:-512}
seed=${SEED:-20260}

data=$output/data
model=$output/model
mkdir -p "$output"

# a process each: threads within them would only wait for each other
OMP_NUM_THREADS=1 sgclassify dataset --output "$data" --fields "$fields" --shifted $(((fields + 15) / 16)) \
    --seed "$seed" --processes "$processes"

precision=fp32
if [[ $device == cuda* ]]; then precision=bf16; fi
start=(sgclassify)
if [[ $gpus -gt 1 ]]; then start=(torchrun --standalone --nproc-per-node "$gpus" --no-python sgclassify); fi
"${start[@]}" train --data "$data" --output "$model" --device "$device" --precision "$precision" \
    --architecture "$architecture" \
    --sequence-epochs "$epochs" --small-epochs 0 --epochs "$epochs" --batch-size "$batch" --resume

for part in validation shifted; do
    sgclassify evaluate --data "$data" --part "$part" --model "$model/model.pt" --json "$output/$part.json"
done
echo "weights: $model/model.pt and its .sha256; learning curves: $model/curves.png"
