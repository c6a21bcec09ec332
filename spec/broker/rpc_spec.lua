-- Remote calls over direct reply-to.
local moonrabbit = require "moonrabbit"
local broker = require "support.broker"
local native = require "moonrabbit.runtime.native"
local ok = broker.ok

describe("rpc", function()
  if not broker.url then pending "AMQP_URL is not set" return end

  local server, client, queue

  before_each(function()
    server, client = broker.connect(), broker.connect()
    local ch = ok(server:channel())
    queue = ok(ch:queue_declare(broker.unique "rpc", { auto_delete = true })).queue
  end)
  after_each(broker.close_all)

  local function serve(fn)
    return ok(server:consume(queue, { prefetch = 50 }, fn))
  end

  it("calls and answers", function()
    serve(function(message)
      assert(message:reply("re: " .. message.body, { content_type = "text/plain", headers = { n = 1 } }))
      message:ack()
    end)
    local reply = ok(client:call("hello", { routing_key = queue, timeout = 5, headers = { a = 1 } }))
    assert.equal("re: hello", reply.body)
    assert.equal("text/plain", reply.properties.content_type)
    assert.same({ n = 1 }, reply.headers)
  end)

  it("answers each of many calls at once", function()
    serve(function(message)
      if #message.body % 2 == 0 then moonrabbit.sleep(0.01) end
      message:reply(message.body)
      message:ack()
    end)
    moonrabbit.run(function()
      local done = 0
      for i = 1, 200 do
        moonrabbit.spawn(function()
          local reply = ok(client:call(("x"):rep(i), { routing_key = queue }))
          assert(#reply.body == i)
          done = done + 1
        end)
      end
      broker.eventually(function() return done == 200 end, 20)
    end)
  end)

  it("times out, and drops the late reply", function()
    local asked, given_up, late
    serve(function(message)
      if message.body == "slow" then
        asked = true
        broker.eventually(function() return given_up end, 20)
      end
      message:reply(message.body)
      message:ack()
      late = message.body == "slow"
    end)
    ok(client:call("first", { routing_key = queue })) -- the consumer of replies is there
    local reply, err = client:call("slow", { routing_key = queue, timeout = 0.1 })
    assert.is_nil(reply)
    assert.equal("timeout", err.kind)
    broker.eventually(function() return asked end)
    given_up = true
    broker.eventually(function() return late end)
    assert.equal("quick", ok(client:call("quick", { routing_key = queue })).body)
  end)

  it("fails at once when no queue takes the request", function()
    local started = native.now()
    local reply, err = client:call("x", { routing_key = "no-such-queue", timeout = 10 })
    assert.is_nil(reply)
    assert.equal("unroutable", err.kind)
    assert.truthy(native.now() - started < 5)
  end)

  it("survives the loss of its channel", function()
    serve(function(message)
      message:reply(message.body)
      message:ack()
    end)
    local reply, err = client:call("x", { exchange = "no-such-exchange", routing_key = queue, timeout = 5 })
    assert.is_nil(reply)
    assert.equal(404, err.code)
    assert.equal("y", ok(client:call("y", { routing_key = queue })).body)
    ok(client:close())
    reply, err = client:call("z", { routing_key = queue })
    assert.is_nil(reply)
    assert.equal("closed", err.kind)
  end)

  it("answers on a channel with confirms", function()
    local ch = ok(server:channel { confirm = true, prefetch = 5 })
    local answered
    ok(ch:consume(queue, {}, function(message)
      answered = { message:reply("confirmed") }
      message:ack()
    end))
    assert.equal("confirmed", ok(client:call("hello", { routing_key = queue, timeout = 5 })).body)
    broker.eventually(function() return answered end)
    assert.same({ true }, answered)
  end)

  it("tells the one who answers that the queue for the answer is gone", function()
    local ch = ok(server:channel { confirm = true })
    local replies = ok(ch:queue_declare("", { exclusive = true })).queue
    ok(ch:publish("hello", { routing_key = queue, reply_to = replies }))
    local message = ok(ch:get(queue))
    ok(ch:queue_delete(replies))
    local sent, err = message:reply("too late")
    assert.is_nil(sent)
    assert.equal("unroutable", err.kind)
    ok(message:ack())
  end)

  it("throws for mistakes", function()
    assert.has_error(function() client:call(5, { routing_key = queue }) end)
    assert.has_error(function() client:call("x", { routing_kee = queue }) end)
    assert.has_error(function() client:call("x", { reply_to = "mine" }) end)
    local ch = ok(server:channel { confirm = true })
    ok(ch:publish("no reply wanted", { routing_key = queue }))
    local message = ok(ch:get(queue))
    local sent, err = message:reply "x"
    assert.is_nil(sent)
    assert.equal("unroutable", err.kind)
  end)
end)
