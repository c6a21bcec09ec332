-- A primary and a standby site in the workers of nginx, whose connections are made anew each time they are lost. Both
-- sites are this broker, each behind a line of its own.
local broker = require "support.broker"
local cjson = require "cjson.safe"
local nginx = require "support.nginx"
local proxy = require "support.proxy"
local ok = broker.ok

local http = [[
  lua_shared_dict switch 1m;
  init_worker_by_lua_block {
    local rabbit = require "moonrabbit.resty"
    local switch = ngx.shared.switch
    rabbit.start {
      sites = {
        primary = { uri = %q },
        standby = { uri = %q, check = function() return switch:get "fit", "not checked yet" end },
        after = 0.3, hold = 0.3, probe = 0.1,
      },
      reconnect = { first = 0.02, max = 0.1 }, exit_timeout = 1,
    }
    rabbit.consume { queue = %q, handler = function(message)
      switch:set("seen", message.body)
      message:ack()
    end }
  }
]]

local locations = [[
  location /ping { return 200 "pong\n"; }
  location /publish {
    content_by_lua_block {
      local ok, err = require "moonrabbit.resty".publish(ngx.var.arg_body, { routing_key = ngx.var.arg_queue })
      ngx.say(ok and "ok" or err.kind .. " " .. tostring(err.temporary) .. " " .. err.message)
    }
  }
  location /async {
    content_by_lua_block {
      ngx.say(tostring(require "moonrabbit.resty".publish_async(ngx.var.arg_body, { routing_key = ngx.var.arg_queue })))
    }
  }
  location /site {
    content_by_lua_block {
      local site, open = require "moonrabbit.resty".run(function(conn) return conn:site() end)
      ngx.print(tostring(site), " ", tostring(open))
    }
  }
  location /fit { content_by_lua_block { ngx.shared.switch:set("fit", true) } }
  location /seen { content_by_lua_block { ngx.print(ngx.shared.switch:get "seen" or "") } }
  location /stats {
    content_by_lua_block {
      local stats = require "moonrabbit.resty".stats()
      stats.reason = tostring(stats.reason)
      ngx.say(require "cjson.safe".encode(stats))
    }
  }
]]

describe("two sites in nginx #resty", function()
  if not broker.url then pending "AMQP_URL is not set" return end
  if nginx.missing() then pending(nginx.missing()) return end

  local channel, queue, answers, primary, standby, server

  local function line(at)
    local to = broker.parsed()
    return proxy.start(to.host, to.port, at)
  end

  local function start(text)
    local function uri(to) return broker.uri { host = "127.0.0.1", port = to.port } end
    server = nginx.start { server = locations, http = text:format(uri(primary), uri(standby), queue) }
    server:ready "/ping"
  end

  before_each(function()
    channel = ok(broker.connect():channel { confirm = true })
    queue, answers = broker.unique "site", broker.unique "answers"
    ok(channel:queue_declare(queue))
    ok(channel:queue_declare(answers))
    primary, standby = line(), line()
    start(http)
  end)

  after_each(function()
    server:stop()
    primary:stop()
    standby:stop()
    channel:queue_delete(queue)
    channel:queue_delete(answers)
    broker.close_all()
  end)

  local function publish(body) return (server:request(("/publish?queue=%s&body=%s"):format(answers, body))) end

  local function at(expected)
    broker.eventually(function() return server:request "/site" == expected end, 20, "it is at " .. expected)
  end

  -- A message that the worker consumes.
  local function consumed(body)
    ok(channel:publish(body, { routing_key = queue }))
    broker.eventually(function() return server:request "/seen" == body end, 20, body .. " is consumed")
  end

  local function taken()
    local message = broker.eventually(function() return channel:get(answers, { no_ack = true }) end)
    return message.body
  end

  it("fails over, holds publishing without holding up the worker, and goes back", function()
    at "primary true"
    assert.equal("ok\n", publish "one")
    assert.equal("one", taken())
    consumed "at the primary"

    local port = primary.port
    primary:stop()
    at "standby false"
    assert.matches("^blocked true publishing is held: site 'standby' is consume%-only", publish "two")
    assert.equal("true\n", (server:request(("/async?queue=%s&body=three"):format(answers))))
    local now = cjson.decode((server:request "/stats"))
    assert.equal(1, now.queued)
    assert.equal(0, now.timeouts) -- it was said at once
    consumed "at the standby"
    assert.is_false(channel:get(answers, { no_ack = true }))

    server:request "/fit"
    assert.equal("three", taken()) -- nothing else wakes the worker
    at "standby true"
    assert.equal("ok\n", publish "four")
    assert.equal("four", taken())

    primary = line(port)
    at "primary true"
    assert.equal("ok\n", publish "five")
    assert.equal("five", taken())
    consumed "at the primary again"
    assert.is_nil(server:log():find "%[error%]", server:log())
  end)

  it("waits with the primary for as long as it was told", function()
    at "primary true"
    server:stop()
    start((http:gsub("after = 0.3", "after = 3600")))
    at "primary true"
    local port, before = primary.port, #standby.lines
    primary:stop()
    -- More attempts than one round over both sites would take.
    broker.eventually(function()
      return select(2, server:log():gsub("publishing: [^\n]*cannot connect[^\n]*trying again", "")) >= 5
    end)
    assert.equal(before, #standby.lines)
    primary = line(port)
    at "primary true"
  end)

  it("leaves in time while publishing is held", function()
    at "primary true"
    primary:stop()
    at "standby false"
    server:request(("/async?queue=%s&body=x"):format(answers))
    local old = server:reload()
    nginx.gone(old, 8)
    server:logged "1 messages were not confirmed when the worker had to leave"
  end)
end)
