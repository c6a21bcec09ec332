-- The queue of what a worker publishes: its bounds, and the gaps that confirms out of their order leave in it.
local broker = require "support.broker"
local cjson = require "cjson.safe"
local nginx = require "support.nginx"
local proxy = require "support.proxy"
local ok = broker.ok

local locations = [[
  location /ping { return 200 "pong\n"; }
  location /publish {
    content_by_lua_block {
      local rabbit = require "moonrabbit.resty"
      local done, failed = 0, "none"
      for i = 1, tonumber(ngx.var.arg_n) do
        local ok, err = rabbit.publish(ngx.var.arg_body .. i, { routing_key = ngx.var.arg_queue,
          timeout = tonumber(ngx.var.arg_timeout), persistent = false })
        if ok then done = done + 1 else failed = err.kind end
      end
      ngx.say(done, " ", failed)
    }
  }
  location /narrow { content_by_lua_block { Client._outbound.window = 100 } }
  location /stats { content_by_lua_block { ngx.say(require "cjson.safe".encode(require "moonrabbit.resty".stats())) } }
  location /model { content_by_lua_block { require("queue_model").run(tonumber(ngx.var.arg_seed), 20000) } }
]]

describe("the queue of a worker #resty", function()
  if not broker.url then pending "AMQP_URL is not set" return end
  if nginx.missing() then pending(nginx.missing()) return end

  local channel, queue, server, line

  setup(function()
    channel = ok(broker.connect():channel())
    queue = broker.unique "queue"
    ok(channel:queue_declare(queue, { durable = true }))
    local to = broker.parsed()
    line = proxy.start(to.host, to.port)
    server = nginx.start {
      http = ([[init_worker_by_lua_block {
        Client = require "moonrabbit.resty".start { uri = %q, entries = 10, reconnect = { first = 0.05 } }
      }]]):format(broker.uri { host = "127.0.0.1", port = line.port }),
      server = locations,
    }
    server:ready "/ping"
  end)

  teardown(function()
    server:stop()
    line:stop()
    channel:queue_delete(queue)
    broker.close_all()
  end)

  local function stats() return cjson.decode((server:request "/stats") or "") or {} end

  local function publish(body, n, timeout)
    return server:request(("/publish?queue=%s&body=%s&n=%d&timeout=%g"):format(queue, body, n, timeout or 10),
      { timeout = 120 })
  end

  it("is what a list would be, in whichever order messages are settled and given up", function()
    for seed = 1, 5 do assert.equal("the same\n", (server:request("/model?seed=" .. seed)), "seed " .. seed) end
  end)

  -- A message whose confirm never comes.
  local function publish_stuck()
    local swallowed = 0
    function line.swallows()
      swallowed = swallowed + 1
      return swallowed == 1
    end
    assert.equal("0 timeout\n", publish("stuck", 1, 2))
    broker.eventually(function() return swallowed == 1 end, 10, "the confirm has come")
  end

  -- The bodies in the queue, with how often each came, and how many these are.
  local function taken()
    local seen, n = {}, 0
    while true do
      local message = ok(channel:get(queue, { no_ack = true }))
      if not message then return seen, n end
      seen[message.body], n = (seen[message.body] or 0) + 1, n + 1
    end
  end

  -- What a lost connection leaves is not in flight, and not settled either, until it is sent again.
  local function settled()
    broker.eventually(function()
      local now = stats()
      return now.in_flight == 0 and now.queued == 0
    end, 10, "it is sent again, and confirmed")
  end

  it("has room though one message is never confirmed, and hundreds after it are", function()
    assert.equal("1 none\n", publish("before", 1))
    local before = stats()
    publish_stuck()
    assert.equal("600 none\n", publish("m", 600)) -- each after the one before, so that each has a confirm of its own
    local now = stats()
    assert.equal(1, now.in_flight)
    assert.equal(0, now.overflows)
    assert.equal(before.confirmed + 600, now.confirmed)
    line:cut()
    settled()
    assert.equal(1, stats().resent)
    local seen, n = taken()
    assert.equal(603, n)
    assert.equal(2, seen.stuck1)
  end)

  it("sends a message again that is not confirmed while a window of later ones is, on another channel", function()
    server:request "/narrow"
    line:cut() -- so that the next channel has that window
    assert.equal("1 none\n", publish("before", 1))
    local before = stats()
    publish_stuck()
    assert.equal("90 none\n", publish("m", 90))
    assert.equal(1, stats().in_flight)
    assert.equal("60 none\n", publish("n", 60))
    settled()
    local now = stats()
    assert.equal(before.resent + 1, now.resent)
    assert.equal(before.sessions, now.sessions)
    assert.equal(before.confirmed + 151, now.confirmed)
    server:logged "a message is unconfirmed while 99 after it were sent"
    local seen, n = taken()
    assert.equal(153, n)
    assert.equal(2, seen.stuck1)
  end)
end)
