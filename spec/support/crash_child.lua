-- An app as a process of its own, to be killed: its handler always fails, so a message is retried once on the ladder and
-- then parked. Ends after that. Arguments: URL, app, queue, "reconnect" or "die".
local mr = require "moonrabbit"

local url, name, queue = arg[1], arg[2], arg[3]
local reconnect = arg[4] == "reconnect" and { first = 0.02 } or false

mr.run(function()
  local app, parked
  app = mr.app {
    name = name, queues = { [queue] = { passive = true } }, log = function() end,
    connect = { uri = url, reconnect = reconnect },
    observer = { settled = function(_, outcome) parked = parked or outcome == "dead_letter" end },
    consumers = {
      { queue = queue, retry = mr.retry.constant { delay = 0.1, attempts = 2 }, in_process = false, prefetch = 10,
        handler = function() return nil, "it failed" end },
    },
  }
  if not app:start() then os.exit(3) end
  while not parked do
    if app.state == "stopped" then os.exit(3) end
    mr.sleep(0.005)
  end
  app:stop(10)
  os.exit(0)
end)
