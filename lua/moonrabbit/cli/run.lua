--- moonrabbit run: an app script as a process, from start to a drained stop.

local connect = require "moonrabbit.cli.connect"
local credentials = require "moonrabbit.cli.credentials"
local exit = require "moonrabbit.cli.exit"
local output = require "moonrabbit.cli.output"
local script = require "moonrabbit.cli.script"

local run = {
  summary = "Run an app script: a Lua file that returns mr.app { … }.",
  epilog = "It keeps trying while the broker is away. SIGTERM and SIGINT stop it: no new messages, those in hand are "
    .. "finished for up to --drain seconds, acks leave; exit code 0, or 1 when something was not done in time. "
    .. "A second one ends it at once. SIGHUP loads the script anew: a broken one is reported and the old goes on.",
}

local function seconds(text)
  local number = tonumber(text)
  if number and number >= 0 and number <= 1e9 then return number end
  return nil, "'" .. text .. "' is no number of seconds"
end

function run.build(command, common)
  command:argument "script" :description "The Lua file."
  command:flag "--check" :description "Only load and check it; nothing is connected or declared."
  command:option "--drain" :argname "<seconds>" :convert(seconds) :default "30"
    :description "How long messages in hand may take when it stops."
  common(command)
end

local function runtime() return require "moonrabbit.runtime.native" end

local function check_only(args, app)
  output.note(("%s: the app '%s' with %d consumers is in order"):format(args.script, app.name, #app.plan.consumers))
  return exit.ok
end

-- The process: the app that runs, and what it is to end with.
local function finish(self, code)
  if self.over then return end
  self.over, self.code = true, code
  self.ended:broadcast()
end

-- Starts an app, and ends the process when it ends by itself.
local function begin(self, app)
  local ok, err = app:start(self.options)
  if not ok then return nil, err end
  runtime().spawn(function()
    local stopped, why = app:wait()
    if not stopped and self.app == app and not self.stopping then finish(self, connect.fail(why, true)) end
  end)
  return true
end

local function start(self)
  output.note "connecting"
  local ok, err = begin(self, self.app)
  if ok then
    output.note(("the app '%s' runs"):format(self.app.name))
  elseif not self.stopping then
    finish(self, connect.fail(err, true))
  end
end

local function stop(self)
  if self.stopping then return end
  self.stopping = true
  if self.app.state ~= "running" then -- it has nothing in hand yet
    runtime().cancel(self.starter)
    return finish(self, exit.ok)
  end
  output.note(("stopping: messages in hand may take %g s"):format(self.args.drain))
  local ok, err = self.app:stop(self.args.drain)
  if not ok then output.complain(err) end
  finish(self, ok and exit.ok or exit.failed)
end

-- The new app begins before the old one ends, so nothing waits; what is in hand is finished by the old one.
local function reload(self)
  if self.stopping or self.reloading or self.app.state ~= "running" then return end
  self.reloading = true
  local app, problem = script.load(self.args.script)
  if app then
    app:restore(self.app:save())
    local ok, err = begin(self, app)
    if not ok then app, problem = nil, tostring(err) end
  end
  if not app then
    output.complain(("the script is not reloaded, the old one goes on: %s"):format(problem))
  else
    local old = self.app
    self.app = app
    output.note(("reloaded: the app '%s' runs"):format(app.name))
    local ok, err = old:stop(self.args.drain)
    if not ok then output.complain(err) end
  end
  self.reloading = false
end

local function watch_signals(self)
  local signal = runtime().signal
  signal("TERM", function() stop(self) end, true)
  signal("INT", function() stop(self) end, true)
  signal("HUP", function() reload(self) end)
end

local function ignore_signals()
  for _, name in ipairs { "TERM", "INT", "HUP" } do runtime().signal(name, nil) end
end

function run.run(args)
  local app, problem = script.load(args.script)
  if not app then
    output.complain(problem)
    return exit.usage
  end
  if args.check then return check_only(args, app) end
  local options
  options, problem = credentials.resolve(args)
  if not options then
    output.complain(problem)
    return exit.usage
  end
  function options.log(level, text)
    if level ~= "debug" then output.note(text) end
  end
  options.name, options.reconnect = "moonrabbit run " .. app.name, { initial = true }
  local self = { args = args, app = app, options = options, ended = runtime().condition() }
  watch_signals(self)
  self.starter = runtime().spawn(start, self)
  while not self.over do self.ended:wait() end
  ignore_signals()
  return self.code
end

return run
