-- The resty runtime in a real nginx: connections of requests and timers.
local moonrabbit = require "moonrabbit"
local broker = require "support.broker"
local native = require "moonrabbit.runtime.native"
local nginx = require "support.nginx"

describe("nginx #resty", function()
  if not broker.url then pending "AMQP_URL is not set" return end
  if nginx.missing() then pending(nginx.missing()) return end

  local server

  local function get(path) return server:request(path) end
  local function log() return server:log() end

  setup(function()
    local locations = {}
    for name in ("work slow ping errors timer closed foreign cancelled addresses"):gmatch "%a+" do
      locations[#locations + 1] =
        ("location /%s { content_by_lua_block { require('handlers').%s() } }"):format(name, name)
    end
    server = nginx.start { server = table.concat(locations, "\n    ") }
    server:ready "/ping"
  end)

  teardown(function() server:stop() end)

  it("connects, publishes with confirms, consumes and closes", function()
    local body = get "/work"
    assert.equal("ok\n", body, log())
  end)

  it("serves others while a request waits", function()
    local channel = broker.ok(broker.connect():channel { confirm = true })
    finally(broker.close_all)
    local queue = broker.ok(channel:queue_declare(broker.unique "slow", { auto_delete = true })).queue
    local slow
    moonrabbit.run(function()
      moonrabbit.spawn(function() slow = get("/slow?queue=" .. queue) end)
      broker.eventually(function()
        return broker.ok(channel:queue_declare(queue, { passive = true })).consumer_count == 1
      end, 10, "it waits")
      for _ = 1, 20 do assert((get "/ping") == "pong\n") end
      assert(not slow, "it did not wait")
      broker.ok(channel:publish("go on", { routing_key = queue }))
      broker.eventually(function() return slow end)
    end)
    assert.equal("ok\n", slow, log())
  end)

  it("keeps no request that the broker closed the connection of", function()
    local started = native.now()
    assert.equal("ok\n", (get "/closed"), log())
    assert.truthy(native.now() - started < 15, native.now() - started .. " s") -- one that is kept takes the 30 s of `get`
  end)

  it("works in a timer", function()
    assert.equal("ok\n", (get "/timer"), log())
  end)

  it("says what is wrong", function()
    local lines = {}
    for line in (get "/errors" or ""):gmatch "[^\n]+" do lines[#lines + 1] = line end
    assert.equal("refused", lines[1], log())
    assert.equal("auth", lines[2])
    assert.equal("vhost", lines[3])
    assert.equal("protocol", lines[4])
    assert.matches("lua_ssl_trusted_certificate", lines[5])
    assert.matches("moonrabbit.resty", lines[6])
  end)

  it("says whose a connection is", function()
    assert.matches("another request or timer", (get "/foreign"), log())
  end)

  it("cancels tasks, and ends reads in time", function()
    assert.equal("ok\n", (get "/cancelled"), log())
  end)

  it("says why there is no way to an address", function()
    local lines = {}
    for line in (get "/addresses" or log()):gmatch "[^\n]+" do lines[#lines + 1] = line end
    assert.matches("^refused true cannot connect to %[::1%]:1: ", lines[1])
    assert.matches("^refused true cannot connect to localhost:1: ", lines[2])
    assert.matches("^dns false cannot connect to broker.example:5672: .*`resolver`", lines[3])
    assert.matches("^refused true cannot connect to unix:/nowhere/amqp.sock: ", lines[4])
  end)

  it("leaves nothing running and no error in the log", function()
    for _ = 1, 5 do assert.equal("ok\n", (get "/work")) end
    assert.is_nil(log():find("%[error%].*lua"), log())
    assert.is_nil(log():find("%[alert%]"), log())
  end)
end)
