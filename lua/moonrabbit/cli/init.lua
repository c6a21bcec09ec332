--- The command line: `moonrabbit COMMAND`. One module a command; this one reads the arguments,
-- runs the command as a task and turns what comes of it into an exit code.

local credentials = require "moonrabbit.cli.credentials"
local exit = require "moonrabbit.cli.exit"
local output = require "moonrabbit.cli.output"

local cli = {}

local names = {
  "publish", "consume", "get", "declare", "bind", "delete", "purge", "dlq", "definitions", "cluster", "run", "explain",
  "topology", "top", "doctor",
}

local epilog = [[
Exit codes:
   0 done   1 the broker said no, or less was done than asked   2 wrong usage
   3 no connection   4 wrong password, unknown vhost or no permission
   130, 143 stopped by SIGINT, SIGTERM

]] .. credentials.environment .. [[


moonrabbit COMMAND --help tells what a command takes.]]

local function build(argparse, given)
  local function common(command) credentials.add_options(command, given) end
  local parser = argparse("moonrabbit", "RabbitMQ from the command line.", epilog)
  parser:usage_max_width(100):help_max_width(100):help_description_margin(30)
  parser:require_command(true):command_target "command"
  parser:flag "--version" :description "Print versions and exit." :action(function()
    local jit = rawget(_G, "jit")
    io.stdout:write(require "moonrabbit"._VERSION, ", ", jit and jit.version or _VERSION, ", rabbitmq-c ",
      require "moonrabbit.core".codec_version(), "\n")
    os.exit(exit.ok)
  end)
  parser:option "--worker" :hidden(true) :convert(tonumber) -- set by `run --workers` for its workers
  common(parser)
  for _, name in ipairs(names) do
    local module = require("moonrabbit.cli." .. name)
    local command = parser:command(name) :summary(module.summary) :description(module.description or module.summary)
    if module.epilog then command:epilog(module.epilog) end
    module.build(command, common)
  end
  return parser
end

-- argparse quotes what was typed, and a URL may have been typed in the wrong place.
local function usage_error(text)
  output.complain(text .. " (moonrabbit --help)")
  return exit.usage
end

-- A throw that leaves a command is a refusal of what was typed (a key too long, a header that cannot
-- be encoded) or a bug. Lua's own errors are bugs and show their traceback.
local function thrown(err)
  local text = tostring(err)
  local first = text:match "^[^\n]*":gsub("^[^%s:]*%.lua:%d+: ", "")
  if os.getenv "MOONRABBIT_DEBUG" or text:find("attempt to ", 1, true) or first:find "stack overflow" then
    io.stderr:write("moonrabbit: this is a bug of moonrabbit: ", output.redact(text), "\n")
    return exit.failed
  end
  output.complain(first)
  return exit.usage
end

--- A command line, read and checked: its arguments, or nil and what is wrong with it. Nothing is run.
function cli.parse(argv)
  local given = {}
  local parsed, args = build(require "argparse", given):pparse(argv)
  if not parsed then return nil, args end
  for name, value in pairs(given) do args[name] = value end
  args.argv = argv
  output.configure(args)
  local command = require("moonrabbit.cli." .. args.command)
  local problem = command.check and command.check(args)
  if problem then return nil, problem end
  return args
end

--- Runs a command. argv: the arguments; returns the exit code.
function cli.main(argv)
  if not pcall(require, "argparse") then
    output.complain "the command line needs argparse (Debian: lua-argparse; else: luarocks install argparse)"
    return exit.usage
  end
  local args, problem = cli.parse(argv)
  if not args then return usage_error(problem) end
  local loaded, moonrabbit = pcall(require, "moonrabbit")
  if not loaded then
    output.complain("moonrabbit's C modules cannot be loaded: " .. tostring(moonrabbit):match "^[^\n]*")
    return exit.failed
  end
  local ran, code = pcall(moonrabbit.run, require("moonrabbit.cli." .. args.command).run, args)
  if not ran then return thrown(code) end
  local flushed, err = output.flush()
  if not flushed then
    output.complain("stdout cannot be written: " .. tostring(err))
    return exit.failed
  end
  return code
end

return cli
