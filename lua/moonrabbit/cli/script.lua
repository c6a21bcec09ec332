--- What the commands that take an app's script share: loading it.

local script = {}

--- The argument and the option.
function script.build(command)
  command:argument "script" :description "The script."
  script.build_env(command)
end

--- The option alone.
function script.build_env(command)
  command:option "--env" :argname "<name>" :description "The environment that mr.config takes (MOONRABBIT_ENV)."
end

--- The app; nil and what is wrong with the script.
---@return moonrabbit.App|nil, string? problem
function script.load(args) return require("moonrabbit.life.script").load(args.script, args.env) end

--- The app, whose secrets are all there; nil and what is wrong.
---@return moonrabbit.App|nil, string? problem
function script.load_to_connect(args)
  local app, problem = script.load(args)
  if not app then return nil, problem end
  local ok
  ok, problem = require("moonrabbit.life.script").verify(app)
  if ok then return app end
  return nil, ("%s: %s"):format(args.script, problem)
end

return script
