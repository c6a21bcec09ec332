--- moonrabbit run

local connect = require "moonrabbit.cli.connect"
local credentials = require "moonrabbit.cli.credentials"
local exit = require "moonrabbit.cli.exit"
local output = require "moonrabbit.cli.output"

local run = {
  summary = "Run an app: a Lua script that returns mr.app { … }.",
  epilog = "SIGTERM or SIGINT: no more messages are taken, those that have come are handled within --drain, and it "
    .. "ends with 0, or with 1 when some were not done; a second signal ends it at once. SIGHUP loads the script "
    .. "again; a broken one changes nothing. While the broker is away it waits.",
}

local function seconds(text)
  local n = tonumber(text)
  if not n or not (n >= 0 and n <= 1e6) then return nil, ("'%s' is no number of seconds"):format(text) end
  return n
end

function run.build(command, common)
  command:argument "script" :description "The script."
  command:flag "--check" :description "Only say whether it is sound. Nothing is connected."
  command:option "--drain" :argname "<seconds>" :convert(seconds) :default "30"
    :description "How long what has arrived may take when it stops."
  command:option "--pid-file" :argname "<file>" :description "Holds the process's number while it runs."
  common(command)
end

local function log(level, text)
  if level == "debug" then return end
  if level == "info" then output.note(text) else output.complain((level == "warn" and "warning: " or "") .. text) end
end

-- The URL typed or in the environment, else the script's own, else the default.
local function options_for(app, args)
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
    local text = given.uri and require("moonrabbit.uri").parse(given.uri)
    if text and text.password ~= text.user then output.secret(text.password) end
    if type(given.password) == "string" then output.secret(given.password) end
  end
  if args.timeout then given.timeout, given.connect_timeout = args.timeout, args.timeout end
  return given
end

local function write_pid(path)
  if not path then return true end
  local file, err = io.open(path, "w")
  if not file then return nil, "the pid file cannot be written: " .. err end
  file:write(require "moonrabbit.net".pid(), "\n")
  file:close()
  return true
end

local function watch_signals(runtime, host)
  for _, name in ipairs { "INT", "TERM" } do runtime.signal(name, function() host:stop() end, true) end
  runtime.signal("HUP", function() host:reload() end)
end

-- What was not done in time is "less than asked", and no lack of a connection.
local function code_of(host, ok, err)
  if ok then return exit.ok end
  return connect.fail(err, not host.asked)
end

local function check(app, args)
  local consumers, queues = #app.plan.consumers, 0
  for _ in pairs(app.plan.queues) do queues = queues + 1 end
  output.result({ script = args.script, app = app.name, consumers = consumers, queues = queues },
    ("%s: the app '%s' is sound: %d consumers, %d queues"):format(args.script, app.name, consumers, queues))
  return exit.ok
end

function run.run(args)
  local script = require "moonrabbit.life.script"
  local app, problem = script.load(args.script)
  if not app then
    output.complain(problem)
    return exit.usage
  end
  if args.check then return check(app, args) end
  local given
  given, problem = options_for(app, args)
  local written = false
  if given then written, problem = write_pid(args.pid_file) end
  if not written then
    output.complain(problem)
    return exit.usage
  end
  local runtime = require "moonrabbit.runtime.native"
  local host = require("moonrabbit.life.host").new {
    runtime = runtime, load = function() return script.load(args.script) end, connect = given, drain = args.drain,
    log = log,
  }
  watch_signals(runtime, host)
  local code = code_of(host, host:run(app))
  if args.pid_file then os.remove(args.pid_file) end
  return code
end

return run
