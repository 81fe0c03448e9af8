"""XSTest (arXiv:2308.01263): 250 safe prompts that look unsafe, 200 unsafe ones beside them. `label` says which."""

from spa_ray.data.named import DataSet, columns

SET = DataSet(page="https://github.com/paul-rottger/xstest", hub="hf://Paul/XSTest", row=columns("prompt"))
