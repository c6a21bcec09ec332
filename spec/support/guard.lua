-- An object whose collection calls fn.
return function(fn)
  if _VERSION == "Lua 5.1" then
    local proxy = newproxy(true) -- luacheck: ignore
    getmetatable(proxy).__gc = fn
    return proxy
  end
  return setmetatable({}, { __gc = fn })
end
