--- What the commands that take an app's script share: loading it, and where it connects to.

local credentials = require "moonrabbit.cli.credentials"
local output = require "moonrabbit.cli.output"

local script = {}

--- The argument and the option.
function script.build(command)
  command:argument "script" :description "The script."
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

-- Whatever is a password here will be in no log.
local function keep_secrets(given)
  local parsed = given.uri and require("moonrabbit.uri").parse(given.uri)
  if parsed and parsed.password ~= parsed.user then output.secret(parsed.password) end
  if type(given.password) == "string" then output.secret(given.password) end
  if type(given.password) == "function" then given.password = require("moonrabbit.secret").from(given.password) end
end

--- Options of connect: the URL typed or in the environment, else the script's own, else the default; nil and what is
--- wrong with them.
---@return table|nil, string? problem
function script.connect_options(app, args)
  local given, parsed, source = credentials.resolve(args)
  if not given then return nil, parsed end
  local own = app._spec.connect
  if source == "the default" and own then
    given = {}
    if type(own) == "table" then
      for name, value in pairs(own) do given[name] = value end
    else
      given.uri = own
    end
    keep_secrets(given)
  end
  if args.timeout then given.timeout, given.connect_timeout = args.timeout, args.timeout end
  return given
end

return script
