-- De-duplication in Redis, with a Redis that hangs for a while in the middle of the work: nothing is handled twice,
-- nothing is lost, and nobody waits for a claim that was his own.
package.path = package.path .. ";/usr/share/lua/5.3/?.lua" -- where Debian has redis-lua, which is plain Lua
local broker = require "support.broker"
local mr = require "moonrabbit"
local redis_server = require "support.redis_server"

local function missing()
  if broker.none() then return broker.none() end
  if not pcall(require, "redis") then return "needs redis-lua" end
  local found = os.execute "command -v redis-server > /dev/null"
  if found ~= true and found ~= 0 then return "needs redis-server" end
end

describe("an app with de-duplication in Redis #app", function()
  local it = broker.it_unless(it, pending, missing()) -- luacheck: ignore 431

  it("handles each message once, although Redis hangs meanwhile", function()
    local redis = redis_server.start()
    finally(function() redis:stop() end)
    local queue, name = broker.unique "q", broker.unique "app"
    local handled, outcomes, total, said = {}, { ok = 0, duplicate = 0 }, 100, {}
    local store = mr.dedupe.redis { url = redis:url(), timeout = 0.3 }
    local app = mr.app {
      name = name, queues = { [queue] = {} },
      log = function(level, text) said[#said + 1] = level .. ": " .. text end,
      observer = { settled = function(_, outcome) outcomes[outcome] = (outcomes[outcome] or 0) + 1 end },
      consumers = { { queue = queue, concurrency = 4, dead_letter = false, in_process = true, dedupe = store,
        handler = function(msg)
          handled[msg.message_id] = (handled[msg.message_id] or 0) + 1
          mr.sleep(0.002)
        end } },
    }
    broker.ok(app:start { consume = broker.connect(), publish = broker.connect() })
    local ch = broker.ok(broker.connect():channel { confirm = true })
    for i = 1, total do
      for _ = 1, 2 do broker.ok(ch:publish("x", { routing_key = queue, message_id = "m" .. i })) end
      if i == 30 then redis.process:signal "STOP" end
    end
    broker.eventually(function()
      return table.concat(said, "\n"):find("cannot be reached", 1, true)
    end, 20, "it says so")
    local before = outcomes.ok
    redis.process:signal "CONT"
    broker.eventually(function() return outcomes.ok + outcomes.duplicate == 2 * total end, 60, "all is handled")
    assert.is_true(before < total)
    assert.same({ ok = total, duplicate = total }, outcomes)
    for i = 1, total do assert.equal(1, handled["m" .. i]) end
    app:stop(5)
    store:close()
    broker.ok(broker.ok(broker.connect():channel()):queue_delete(queue))
    broker.close_all()
  end)
end)
