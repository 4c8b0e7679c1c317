#!/bin/sh
# The table of trainers with the older libraries that people have pinned: LLaMA-Factory 0.9.5 and axolotl 0.19.0. Each pair gets
# a virtual environment of its own, with the wheel as a user installs it. Then DeepSpeed, in a folder of its own.
set -eu
cd "$(dirname "$0")/.."
torch=$1
rm -rf build/wheel
.venv/bin/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheel .
wheel=$(ls build/wheel/*.whl)
for pair in "5.6.0 0.18.1" "5.16.1 0.20.0"; do
    transformers=${pair% *} peft=${pair#* }
    folder=build/versions/transformers-$transformers
    [ -d "$folder" ] || .venv/bin/python -m venv "$folder"
    "$folder/bin/python" -m pip install --quiet "$torch"
    "$folder/bin/python" -m pip install --quiet "$wheel[server,transformers]" "transformers==$transformers" "peft==$peft" \
        pytest pytest-timeout trustme
    "$folder/bin/python" -m pip install --quiet --force-reinstall --no-deps "$wheel"
    tests=tests/ecosystem/test_trainers.py
    if [ "$transformers" = 5.16.1 ]; then  # axolotl's plug-in interface, without the GPU libraries that its trainer needs
        "$folder/bin/python" -m pip install --quiet --no-deps axolotl==0.19.0 addict
        tests="$tests tests/ecosystem/test_axolotl.py"
    fi
    # shellcheck disable=SC2086  # several names
    OLDER_LIBRARIES=1 "$folder/bin/python" -m pytest -q -p no:cacheprovider $tests
done

deepspeed=$PWD/build/versions/deepspeed
if [ ! -d "$deepspeed" ]; then
    DS_BUILD_OPS=0 .venv/bin/python -m pip install --quiet --no-deps --target "$deepspeed.new" \
        "deepspeed>=0.19,<0.20" einops hjson msgpack nvidia-ml-py py-cpuinfo pydantic pydantic-core annotated-types typing-inspection tqdm
    mv "$deepspeed.new" "$deepspeed"
fi
DEEPSPEED_PATH=$deepspeed .venv/bin/python -m pytest -q -p no:cacheprovider tests/ecosystem/test_deepspeed.py
