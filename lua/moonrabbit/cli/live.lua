--- What `moonrabbit run` does once its arguments are sound: one process alone, a parent of workers, or a worker.

local connect = require "moonrabbit.cli.connect"
local exit = require "moonrabbit.cli.exit"
local output = require "moonrabbit.cli.output"
local script = require "moonrabbit.cli.script"

local live = {}

local function native() return require "moonrabbit.runtime.native" end

local function make_log(args)
  local log = require("moonrabbit.log").new {
    format = args.log_format, level = args.log_level or args.quiet and "warn" or "info",
    fields = args.worker and { worker = args.worker } or nil,
  }
  native().on_error = function(text) log("error", "an error in a task: " .. text) end
  return log
end

local function new_metrics(args, log) return args.metrics and require("moonrabbit.metrics").new { log = log } or nil end

-- A server for --metrics; true without; nil when the address cannot be had, and the complaint is made.
local function serve(args, log, opts)
  if not args.metrics then return true end
  opts.address, opts.log = args.metrics, log
  local server, err = require("moonrabbit.metrics").serve(opts)
  if not server then
    output.complain(err)
    return nil
  end
  local where = server:where()
  log("info", "metrics: " .. where .. (where:find "^http" and "/metrics" or ""))
  return server
end

local function new_host(args, given, client, log, metrics, more)
  local opts = {
    runtime = native(), load = function() return script.load_to_connect(args) end, connect = given, drain = args.drain,
    log = log, metrics = metrics, management = client or nil,
  }
  for name, value in pairs(more or {}) do opts[name] = value end
  return require("moonrabbit.life.host").new(opts)
end

-- What was not done in time is "less than asked", and no lack of a connection.
local function code_of(log, host, ok, err)
  if ok then return exit.ok end
  log("error", tostring(err))
  return connect.exit_code(err, not host.asked)
end

--- One process. `given`: options of connect; `client`: of the management API, or false.
function live.alone(args, app, given, client)
  local log = make_log(args)
  local metrics = new_metrics(args, log)
  local host = new_host(args, given, client, log, metrics)
  if metrics then metrics:ready("app", function() return host:is_ready() end) end
  local server = serve(args, log, { metrics = metrics })
  if not server then return exit.failed end
  for _, name in ipairs { "INT", "TERM" } do native().signal(name, function() host:stop() end, true) end
  native().signal("HUP", function() host:reload() end)
  local code = code_of(log, host, host:run(app))
  if metrics then server:close() end
  return code
end

--- A worker of a parent.
function live.worker(args, app, given, client)
  local worker, problem = require("moonrabbit.life.worker").new(native())
  if not worker then
    output.complain(problem)
    return exit.usage
  end
  require("moonrabbit.life.notify").leave_to_parent()
  local log = make_log(args)
  local metrics = new_metrics(args, log)
  local host = new_host(args, given, client, log, metrics, {
    ready = function() worker:ready() end, reloaded = function(...) worker:reloaded(...) end,
  })
  worker:serve(host, log, metrics)
  local code = code_of(log, host, host:run(app))
  worker:leave()
  return code
end

-- The command line of a worker: the parent's, and its number in front, where no script or option can be taken for it.
local function words_of(argv, number)
  local words, first = {}, 0
  while argv[first - 1] do first = first - 1 end
  for i = first, 0 do words[#words + 1] = argv[i] end
  words[#words + 1] = "--worker"
  words[#words + 1] = ("%d"):format(number)
  for _, word in ipairs(argv) do words[#words + 1] = word end
  return words
end

local numbers = { INT = exit.interrupted, TERM = exit.terminated }

--- A parent of workers.
function live.parent(args)
  local log = make_log(args)
  local crew = require("moonrabbit.life.crew").new {
    runtime = native(), count = args.workers, words = function(n) return words_of(args.argv, n) end, drain = args.drain,
    log = log,
  }
  local server = serve(args, log, {
    text = function() return crew:page() end, ready = function() return crew:ready() end,
    health = function() return crew:healthy() end,
  })
  if not server then return exit.failed end
  for name, code in pairs(numbers) do native().signal(name, function() crew:stop(code) end) end
  native().signal("HUP", function() crew:reload() end)
  local code = crew:run()
  if args.metrics then server:close() end
  return code
end

return live
