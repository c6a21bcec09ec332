-- The mode "smart", with a clock and an API of our own.
local native = require "moonrabbit.runtime.native"
local moonrabbit = require "moonrabbit"
local Smart = require "moonrabbit.cluster.smart"
local uri = require "moonrabbit.uri"
local http_server = require "support.http_server"

describe("the mode smart", function()
  local listed, server, moved, said

  before_each(function()
    listed, moved, said = {}, nil, {}
    for i, port in ipairs { 5001, 5002 } do
      listed[i] = assert(uri.parse(("amqp://guest:guest@127.0.0.1:%d/"):format(port)))
      listed[i].user, listed[i].password = "guest", "guest"
    end
  end)

  after_each(function()
    if server then server.stop() end
    server = nil
  end)

  local function refused(final) return { kind = final and "tls" or "refused", temporary = not final } end

  local function new(opts, runtime)
    opts.smart = opts.smart or {}
    opts.smart.refresh = 0
    local smart = Smart.new(listed, opts, { runtime = runtime or native, log = function() end }, 2)
    smart:attach {
      emit = function(_, what, details) said[#said + 1] = what .. " " .. tostring(details.err) end,
      move = function(why) moved = why end,
    }
    return smart
  end

  it("does not end a connection as long as others are only left alone", function()
    local time = 0
    local smart = new({}, {
      now = function() return time end, spawn = function() return {} end, condition = native.condition,
    })
    smart:round()
    smart:failed(listed[1], refused())
    assert.same({ listed[2] }, smart:round())
    local err = refused(true)
    smart:failed(listed[2], err)
    assert.is_true(err.temporary)
    -- When all of a round refuse for good, they do.
    time = 100
    assert.equal(2, #smart:round())
    err = refused(true)
    smart:failed(listed[1], err)
    assert.is_false(err.temporary)
  end)

  -- An API of two nodes; the second leads the queue.
  local function two_nodes()
    server = http_server.start(function(request)
      local body = '{"type":"quorum","leader":"r@two","members":["r@one","r@two"],"online":["r@one","r@two"]}'
      if request.target:find "overview" then
        body = '{"listeners":[{"node":"r@one","protocol":"amqp","ip_address":"127.0.0.1","port":5001},'
          .. '{"node":"r@two","protocol":"amqp","ip_address":"127.0.0.1","port":5002}]}'
      elseif request.target:find "nodes" then
        body = '[{"name":"r@one","running":true},{"name":"r@two","running":true}]'
      end
      return http_server.response(200, body)
    end)
    return server.uri
  end

  local function learn(smart)
    moonrabbit.run(function()
      smart:refresh()
      while smart.learning do smart.learned:wait(5) end
    end)
  end

  it("asks the next API for the leader when one cannot tell, also where it asks for no nodes", function()
    for _, discover in ipairs { false, true } do
      two_nodes()
      local half = http_server.start(function(request)
        return http_server.response(request.target:find "queues" and 500 or 200,
          request.target:find "nodes" and '[{"name":"r@one","running":true}]' or "{}")
      end)
      for _, first in ipairs { "http://127.0.0.1:1", half.uri } do
        local smart = new { near = "q", management = { first, server.uri }, smart = { discover = discover } }
        learn(smart)
        assert.equal("r@two", smart.leader)
        for _, each in ipairs(said) do assert.not_matches("^unknown", each) end
        assert.equal("127.0.0.1:" .. server.port, smart.good.endpoint)
      end
      half.stop()
      server.stop()
    end
  end)

  it("says that the leader cannot be learned, also where the API that was asked last is not there", function()
    server = http_server.start(function(request)
      return http_server.response(request.target:find "queues" and 500 or 200,
        request.target:find "nodes" and '[{"name":"r@one","running":true}]' or "{}")
    end)
    learn(new { near = "q", management = { server.uri, "http://127.0.0.1:1" } })
    assert.matches("^unknown .*500", said[#said])
  end)

  it("tells what looks at it of the nodes that it has learned", function()
    listed[2] = nil
    local smart = new { management = two_nodes() }
    learn(smart)
    local source = require("moonrabbit.cluster").source({ uri = "amqp://guest:guest@127.0.0.1:5001/" },
      { runtime = native, log = function() end, past = smart }, 2)
    local ports = {}
    for i, target in ipairs(source:round()) do ports[i] = target.port end
    assert.same({ 5001, 5002 }, ports)
  end)

  it("follows a leader only to a node that it would try", function()
    local smart = new { near = "q", management = two_nodes(), smart = { follow = true, quarantine = { first = 60 } } }
    smart:connected(listed[1])
    smart:failed(listed[2], refused())
    for _ = 1, 3 do learn(smart) end
    assert.equal("r@two", smart.leader)
    assert.is_nil(moved)
    smart.quarantine:connected("127.0.0.1:5002", native.now())
    for _ = 1, 2 do learn(smart) end
    assert.matches("led by r@two", moved)
  end)

  it("says once when a function of the user's throws, and is not stopped by it", function()
    local threw = native.on_error
    native.on_error = function(text) said[#said + 1] = "an error left a task: " .. text end
    finally(function() native.on_error = threw end)
    local smart = new { management = two_nodes(), smart = { address = function() error("no such map", 0) end } }
    for _ = 1, 2 do learn(smart) end
    assert.same({ "unknown no such map" }, said)
    moonrabbit.run(function() assert.equal(2, #smart:round()) end)
    smart:close()
  end)
end)
