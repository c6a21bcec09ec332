-- In which order the listed endpoints are tried.
local Endpoints = require "moonrabbit.endpoints"
local List = require "moonrabbit.cluster.list"
local native = require "moonrabbit.runtime.native"
local uri = require "moonrabbit.uri"

local function targets_of(...)
  local list = {}
  for i, host in ipairs { ... } do list[i] = assert(uri.parse("amqp://" .. host .. "/")) end
  return list
end

local sources = {
  { "a list", function(list) return Endpoints.new(list) end },
  { "a list that is made anew for each round", function(list) return List.new(list, {}, { runtime = {} }) end },
}

describe("a list of endpoints", function()
  it("does not end a connection as long as a service cannot be looked up", function()
    local plain = assert(uri.parse "amqp://a/")
    local list = List.new({ assert(uri.parse "amqp+srv://service.test/"), plain },
      { dns = { servers = { "127.0.0.1:1" } } }, { runtime = native, log = function() end })
    local err = { kind = "auth", temporary = false }
    native.run(function()
      assert.same({ plain }, list:round())
      list:failed(plain, err)
    end)
    assert.is_true(err.temporary)
  end)

  it("leaves out none of two at one address when that falls silent", function()
    local two = { assert(uri.parse "amqp://a:one@h/"), assert(uri.parse "amqp://b:two@h/") }
    local list = List.new(two, {}, { runtime = native })
    list:lost(two[1], { kind = "timeout" })
    assert.equal(2, #list:round())
  end)
end)

for _, source in ipairs(sources) do
  describe(source[1] .. " of endpoints", function()
    local timeout, refused = { kind = "timeout" }, { kind = "refused" }
    local list, endpoints

    before_each(function()
      list = targets_of("a", "b", "c")
      endpoints = source[2](list)
    end)

    local function order()
      local hosts = {}
      for i, target in ipairs(endpoints:round()) do hosts[i] = target.host end
      return table.concat(hosts)
    end

    it("is tried in its order", function()
      assert.equal("abc", order())
      endpoints:failed(list[1], refused)
      endpoints:connected(list[2])
      endpoints:lost(list[2], { kind = "closed" })
      assert.equal("abc", order())
    end)

    it("has the one last that fell silent, until another one is found", function()
      endpoints:connected(list[1])
      endpoints:lost(list[1], timeout)
      assert.equal("bca", order())
      endpoints:failed(list[2], refused)
      endpoints:failed(list[3], refused)
      endpoints:failed(list[1], timeout)
      assert.equal("bca", order())
      endpoints:connected(list[2])
      assert.equal("abc", order())
    end)

    it("has the one last that let an attempt run into its timeout", function()
      endpoints:failed(list[2], timeout)
      endpoints:failed(list[3], refused)
      assert.equal("acb", order())
      endpoints:connected(list[3])
      endpoints:lost(list[3], { kind = "closed" })
      assert.equal("abc", order())
    end)
  end)
end
