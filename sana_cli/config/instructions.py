"""The complex human instruction of the published models (arXiv 2410.10629, section 2.3), in its two spellings.

It goes before each caption. A model draws best under the one that it was trained with.
"""

# the paper's complex human instruction; official configs and diffusers quote two words in it differently
_INSTRUCTION = """\
Given a user prompt, generate an {} that provides detailed visual descriptions suitable for image generation. \
Evaluate the level of detail in the user prompt:
- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, and spatial relationships to \
create vivid and concrete scenes.
- If the prompt is already detailed, refine and enhance the existing details slightly without overcomplicating.
Here are examples of how to transform or refine prompts:
- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round shape, sleeping peacefully on a \
warm sunny windowsill, surrounded by pots of blooming red flowers.
- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, featuring glowing street lamps, a \
diverse crowd of people in colorful clothing, and a double-decker bus passing by towering glass skyscrapers.
Please generate only the enhanced description for the prompt below and avoid including any additional commentary or \
evaluations:
User Prompt: """
# the official YAML files put \" between single quotes, where a backslash is a backslash: models were trained with it
OFFICIAL = _INSTRUCTION.format('\\"Enhanced prompt\\"')
DIFFUSERS = _INSTRUCTION.format("'Enhanced prompt'")
NAMED = {"official": OFFICIAL, "diffusers": DIFFUSERS}  # what a config may call them
