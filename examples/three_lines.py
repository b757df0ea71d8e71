"""Distil in three lines: any two models that share a tokenizer, any data set with prompts.

python examples/three_lines.py STUDENT TEACHER DATA
"""

import sys

import opdkit

student, teacher, data = sys.argv[1:4]
result = opdkit.distill(
    student, teacher, prompts=data, method="iw_opd", steps=20, max_completion_length=128
)
print(result.model, result.metrics[-1]["teacher_kl/sampled"])
