"""Complete named trainings as functions. `RECIPES` maps a name to "module:function"; users may give their own."""

from __future__ import annotations

RECIPES: dict[str, str] = {
    "stage-64-codec": "unspool.recipes.stage:codec_64",
    "stage-64-text": "unspool.recipes.stage:text_64",
    "stage-64-teacher": "unspool.recipes.stage:teacher_64",
    "stage-64-student": "unspool.recipes.stage:student_64",
    "stage-64-motion": "unspool.recipes.stage:motion_64",
    "stage-64-consistency": "unspool.recipes.stage_distil:consistency_64",
    "stage-64-ode": "unspool.recipes.stage_distil:ode_64",
    "stage-64-self-forcing": "unspool.recipes.stage_distil:self_forcing_64",
    "stage-64-long": "unspool.recipes.stage_distil:long_64",
    "stage-64-gan": "unspool.recipes.stage_distil:gan_64",
    "stage-64-self-forcing-bidirectional": "unspool.recipes.stage_distil:self_forcing_64_bidirectional",
    "stage-64-causvid": "unspool.recipes.stage_distil:causvid_64",
    "stage-128-codec": "unspool.recipes.stage:codec_128",
    "stage-128-teacher": "unspool.recipes.stage:teacher_128",
    "stage-128-student": "unspool.recipes.stage:student_128",
    "stage-128-motion": "unspool.recipes.stage:motion_128",
    "stage-128-consistency": "unspool.recipes.stage_distil:consistency_128",
    "stage-128-self-forcing": "unspool.recipes.stage_distil:self_forcing_128",
    "stage-128-long": "unspool.recipes.stage_distil:long_128",
    "ca2vdm-stage": "unspool.recipes.ca2vdm:ca2vdm_stage",
    "vid-gpt-stage": "unspool.recipes.ca2vdm:vid_gpt_stage",
    "ca2vdm-overfit": "unspool.recipes.ca2vdm:ca2vdm_overfit",
    "wan-1.3b-causvid-ode": "unspool.recipes.wan_distil:wan_causvid_ode",
    "wan-1.3b-causvid": "unspool.recipes.wan_distil:wan_causvid_dmd",
    "wan-1.3b-consistency": "unspool.recipes.wan_distil:wan_consistency",
    "wan-1.3b-self-forcing": "unspool.recipes.wan_distil:wan_self_forcing",
    "finetune-video": "unspool.recipes.finetune_video:finetune_video",
}
"""Name -> "module:function"."""
