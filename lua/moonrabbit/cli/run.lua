--- moonrabbit run

local api = require "moonrabbit.cli.api"
local app_connection = require "moonrabbit.cli.app_connection"
local exit = require "moonrabbit.cli.exit"
local live = require "moonrabbit.cli.live"
local output = require "moonrabbit.cli.output"
local script = require "moonrabbit.cli.script"

local run = {
  summary = "Run an app: a Lua script that returns mr.app { … }.",
  epilog = "SIGTERM or SIGINT: no more messages are taken, those that have come are handled within --drain, and it "
    .. "ends with 0, or with 1 when some were not done; a second signal ends it at once. SIGHUP loads the script "
    .. "again; a broken one changes nothing. While the broker is away it waits.",
}

local MOST_WORKERS = 1000

local function seconds(text)
  local n = tonumber(text)
  if not n or not (n >= 0 and n <= 1e6) then return nil, ("'%s' is no number of seconds"):format(text) end
  return n
end

local function workers(text)
  local n = tonumber(text)
  if not n or n < 1 or n > MOST_WORKERS or n % 1 ~= 0 then
    return nil, ("--workers takes a number from 1 to %d, not '%s'"):format(MOST_WORKERS, text)
  end
  return n
end

local function address(text)
  local expected = require("moonrabbit.metrics.server").address_problem(text)
  if expected then return nil, ("--metrics takes %s, not '%s'"):format(expected, text) end
  return text
end

function run.build(command, common)
  script.build(command)
  command:flag "--check" :description "Only say whether it is sound. Nothing is connected."
  command:option "--drain" :argname "<seconds>" :convert(seconds) :default "30"
    :description "How long what has arrived may take when it stops."
  command:option "--metrics" :argname "<address>" :convert(address)
    :description("Serve /metrics, /healthz and /readyz there, such as 127.0.0.1:9419. Port 0: any; a path: a unix "
      .. "socket.")
  api.add_choice(command, "for the metrics of the retry ladder: what is stuck")
  command:option "--log-format" :argname "<format>" :choices { "line", "json" } :default "line"
    :description "line or json."
  command:option "--log-level" :argname "<level>" :choices { "debug", "info", "warn", "error" }
    :description "What is logged: debug, info (default), warn or error."
  command:option "--workers" :argname "<n>" :convert(workers)
    :description("So many processes; one that ends is replaced. Signals go to the first process, which does the rest: "
      .. "SIGHUP reloads one after the other.")
  command:option "--pid-file" :argname "<file>" :description "Holds the process's number while it runs."
  common(command)
end

local function write_pid(path)
  if not path then return true end
  local file, err = io.open(path, "w")
  if not file then return nil, "the pid file cannot be written: " .. err end
  file:write(require "moonrabbit.net".pid(), "\n")
  file:close()
  return true
end

-- Another process may have taken this one's place, and written its own.
local function remove_pid(path)
  local file = path and io.open(path, "r")
  if not file then return end
  local pid = file:read "*l"
  file:close()
  if tonumber(pid) == require "moonrabbit.net".pid() then os.remove(path) end
end

local function wrong(problem)
  output.complain(problem)
  return exit.usage
end

local function check(app, args)
  local consumers, queues = #app.plan.consumers, 0
  for _ in pairs(app.plan.queues) do queues = queues + 1 end
  output.result({ script = args.script, app = app.name, consumers = consumers, queues = queues },
    ("%s: the app '%s' is sound: %d consumers, %d queues"):format(args.script, app.name, consumers, queues))
  return exit.ok
end

-- fn(...) -> exit code, with a pid file while it runs.
local function with_pid_file(args, fn, ...)
  local written, problem = write_pid(args.pid_file)
  if not written then return wrong(problem) end
  local code = fn(args, ...)
  remove_pid(args.pid_file)
  return code
end

function run.run(args)
  io.stdout:setvbuf "line" -- what handlers print is in the log of a service at once, not when a block is full
  if args.workers and not args.worker and not args.check then return with_pid_file(args, live.parent) end
  local app, problem = script.load_to_connect(args)
  if not app then return wrong(problem) end
  if args.check then return check(app, args) end
  local given, client
  given, problem = app_connection.options(app, args)
  if not given then return wrong(problem) end
  client, problem = api.of_app(args, given)
  if client == nil then return wrong(problem) end
  if args.worker then return live.worker(args, app, given, client) end
  return with_pid_file(args, live.alone, app, given, client)
end

return run
