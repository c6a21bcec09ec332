--- Connecting, and what an error of the world means for the exit code.

local credentials = require "moonrabbit.cli.credentials"
local exit = require "moonrabbit.cli.exit"
local output = require "moonrabbit.cli.output"

local connect = {}

local kinds = { auth = exit.denied, vhost = exit.denied }
local unreachable = { refused = true, timeout = true, dns = true, tls = true, protocol = true, closed = true }

--- The exit code for an error; `connecting`: whether there was no connection yet.
function connect.exit_code(err, connecting)
  if type(err) ~= "table" then return exit.failed end
  if kinds[err.kind] or err.code == 403 then return exit.denied end
  if connecting and unreachable[err.kind] then return exit.unreachable end
  return exit.failed
end

--- Complains about an error and returns its exit code.
function connect.fail(err, connecting)
  output.complain(err)
  return connect.exit_code(err, connecting)
end

--- A connection, or nil and an exit code, with the complaint made. `given`: its options; by default those of the
--- arguments and the environment.
function connect.open(args, extra, given)
  local options, problem = given, nil
  if not options then options, problem = credentials.resolve(args) end
  if not options then
    output.complain(problem)
    return nil, exit.usage
  end
  options.name = "moonrabbit " .. args.command
  local patience = args.command ~= "consume" and args.timeout or 10
  options.timeout, options.connect_timeout = patience, patience
  options.reconnect = false -- a command says what went wrong, and ends
  for name, value in pairs(extra or {}) do options[name] = value end
  local moonrabbit = require "moonrabbit"
  local conn, err = moonrabbit.connect(options)
  if not conn then return nil, connect.fail(err, true) end
  return conn
end

--- Opens a connection and a channel, runs fn(channel, connection), closes both.
-- fn returns an exit code, or nil, err. `at_stake`: what may be lost when the close fails, which then is a failure.
-- `given`: options of the connection, as for open.
function connect.with_channel(args, channel_options, fn, at_stake, given)
  local conn, code = connect.open(args, nil, given)
  if not conn then return code end
  local ch, err = conn:channel(channel_options)
  if not ch then
    conn:close(1)
    return connect.fail(err)
  end
  local result, problem = fn(ch, conn)
  local closed, why = conn:close(conn.call_timeout)
  if result == nil then return connect.fail(problem) end
  if at_stake and not closed then
    output.complain(("%s may not have reached the broker: %s"):format(at_stake, tostring(why)))
    if result == exit.ok then return exit.failed end
  end
  return result
end

--- Watches SIGINT and SIGTERM: fn(exit_code) is called in a task of its own.
function connect.on_stop(fn)
  local runtime = require "moonrabbit.runtime.native"
  runtime.signal("INT", function() fn(exit.interrupted) end)
  runtime.signal("TERM", function() fn(exit.terminated) end)
  return function()
    runtime.signal("INT", nil)
    runtime.signal("TERM", nil)
  end
end

--- Monotonic seconds.
function connect.now()
  return require "moonrabbit.runtime.native".now()
end

return connect
