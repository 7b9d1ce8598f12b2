# SPDX-License-Identifier: Apache-2.0
"""The README's main job: fine-tune a real model with a loss in Python.

Read `run.py` first; it is a training loop as a user would write it.
"""
