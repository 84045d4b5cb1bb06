"""What a client of a served model may choose. `fields` is the JSON schema of the model that validates a request."""

from typing import Any

from latentac.serving.forms import MAX_WEIGHT
from latentac.serving.model import SteeredDiffusion
from latentac.system.names import PLAIN


def options_of(model: SteeredDiffusion) -> dict[str, Any]:
    """What a client of `model` may choose."""
    exported, critic = model.generator.exported, model.generator.critic
    fields = model.generator.forms.request.model_json_schema()["properties"]
    default = exported.default_method
    plain = {"name": PLAIN, "summary": "no steering: the policy alone", "gradient": False, "several": False}
    return {
        "name": model.name,
        "version": exported.version,
        "run": exported.run,
        "notice": exported.notice,
        "size": list(exported.size),
        "policies": exported.policies,
        "methods": [
            {
                "name": name,
                "summary": method.summary,
                "gradient": method.needs_gradient,
                "several": True,
                "particles": method.particles,
            }
            for name, method in exported.methods.items()
        ]
        + [{**plain, "particles": 1}],
        "rewards": [
            {
                "name": reward.name,
                "unit": reward.unit,
                "default_weight": exported.default_weights(default).get(reward.name, 0.0),
                "mean": float(critic.mean[head]),
                "std": float(critic.std[head]),
            }
            for head, reward in enumerate(exported.rewards)
        ],
        "defaults": {
            "num_steps": exported.kernel.num_steps,
            "method": default,
            "particles": exported.methods[default].particles if default in exported.methods else 1,
            **{name: fields[name]["default"] for name in ("count", "seed", "guidance_scale")},
            "strengths": {name: method.strength for name, method in exported.methods.items()},
        },
        "fields": fields,
        "limits": {
            **exported.limits.model_dump(),
            "max_weight": MAX_WEIGHT,
            "max_tokens": model.generator.max_tokens,
        },
        "examples": exported.examples,
    }
