# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning with a loss of the server.

    gradwire serve &
    python examples/sft.py MODEL_DIRECTORY

The data are lines of JSON with "prompt" and "answer", by default the
quickstart's.
"""

import argparse
import json

import gradwire
from gradwire.quickstart import data
from transformers import AutoTokenizer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", help="a Hugging Face directory")
parser.add_argument("--data", help="a file of JSON lines")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--batch", type=int, default=8)
args = parser.parse_args()

if args.data:
    with open(args.data, encoding="utf-8") as lines:
        examples = [data.Example(**json.loads(line)) for line in lines]
else:
    examples = data.train_examples()
tokenizer = AutoTokenizer.from_pretrained(args.model)

with gradwire.ServiceClient() as service:
    policy = service.create_training_client(base_model=args.model)
    for batch in data.batches(examples, args.batch, args.steps, seed=0):
        datums = [data.to_datum(tokenizer, e.prompt, e.answer) for e in batch]
        step = policy.forward_backward(datums, "cross_entropy")
        # The server's loss is a sum, so the step divides.
        update = policy.optim_step(
            gradwire.AdamParams(
                learning_rate=2e-5,
                normalization="num_loss_tokens",
                grad_clip_norm=1.0,
            )
        ).result()
        loss = step.result().metrics["loss:sum"] / update.loss_tokens
        print(f"step {update.optimizer_step}  loss {loss:.3f}")
    print(policy.save_weights_for_sampler("sft").result().local_path)
