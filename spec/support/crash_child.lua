-- A consumer as a process of its own, to be killed: its handler always fails, so a message is retried once on the ladder
-- and then parked. Ends after that. Arguments: URL, app, queue.
local moonrabbit = require "moonrabbit"
local disposal = require "moonrabbit.app.disposal"

local url, app, queue, reconnect = arg[1], arg[2], arg[3], arg[4] == "reconnect"
local failure = { message = "it failed", kind = "error" }

local function connect()
  local policy = reconnect and { first = 0.02 } or false
  return assert(moonrabbit.connect { uri = url, reconnect = policy, log = function() end })
end

local function await_open(conn)
  while conn:state() ~= "open" do moonrabbit.sleep(0.01) end
end

moonrabbit.run(function()
  local conn, out = connect(), connect()
  local ch, publishes = assert(conn:channel { prefetch = 10 }), assert(out:channel { confirm = true })
  local d = disposal.new { app = app, consumer = { queue = queue }, publisher = function()
    if not publishes:is_open() then
      local channel, err = out:channel { confirm = true }
      if not channel then return nil, err end
      publishes = channel
    end
    return publishes
  end }
  assert(d:setup(ch))
  local consumer = assert(ch:consume(queue))
  while true do
    local msg = consumer:receive(30)
    if not msg then os.exit(3) end
    local parked = d:attempt(msg) > 1
    local ok
    if parked then ok = d:dead_letter(msg, "attempts", failure) else ok = d:retry(msg, 0.1, failure) end
    if ok then msg:ack() else d:give_back(msg, 0) end
    if ok and parked then break end
  end
  await_open(conn)
  conn:close()
  out:close()
  os.exit(0)
end)
